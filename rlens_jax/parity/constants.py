"""Sizes and constants of a model as a bundle names them: facts that two frameworks must agree on before numbers are compared."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlens_jax.errors import UserError, suggest
from rlens_jax.models.forward import FamilyConfig

# What the layouts of a folder say in different places, and what changes no number of a prompt that is accepted.
_NOT_COMPARED = ("native", "max_tokens", "image_token", "video_token", "text_model", "decoder.context", "decoder.tied_head")
_ONLY_WITH = {"vision.qk_norm_eps": "vision.qk_norm"}


@dataclass(frozen=True)
class ConstantDifference:
    """A constant with two values, both as JSON values."""

    name: str
    ours: Any
    theirs: Any


def constants_of(config: FamilyConfig) -> dict[str, Any]:
    """All sizes and constants that decide a computation, as JSON values by dotted name, such as decoder.norm_eps."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
        flat |= {f"{name}.{field}": item for field, item in value.items()} if isinstance(value, dict) else {name: value}
    return {
        name: value
        for name, value in flat.items()
        if name not in _NOT_COMPARED and name.partition(".")[0] not in _NOT_COMPARED and flat.get(_ONLY_WITH.get(name, ""), True)
    }


def compare_constants(config: FamilyConfig, theirs: Mapping[str, Any], where: str) -> tuple[ConstantDifference, ...]:
    """The constants that differ among those that a bundle names. UserError, beginning with `where`, for an unknown name."""
    ours = constants_of(config)
    known = {*ours, *_ONLY_WITH}
    for name in theirs:
        if name not in known:
            raise UserError(
                f"{where}: constants: {name!r} is not known{suggest(name, known)}; known are {', '.join(sorted(known))}"
            )
    return tuple(
        ConstantDifference(name, ours[name], value) for name, value in theirs.items() if name in ours and ours[name] != value
    )
