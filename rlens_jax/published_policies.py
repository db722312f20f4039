"""Other people's layer policies as plans: which layers their published files skip for visual tokens.

    opskip:llava-1.5-7b/12      a preset of Op-Skip (arXiv 2606.31903): its number counts changed layers
    shortv:llava-1.5-7b         the list of ShortV (arXiv 2504.00502)

Both kinds are also read from files in their own format: Op-Skip's JSON object, of which all fields are checked, and a JSON list
of the layers to freeze, as ShortV gives them. The data in rlens_jax/policies/ are layer numbers, each file with its source.

Theirs and ours: Op-Skip's `attention_only` skips the FFN of visual tokens, its `ffn_only` skips their attention update, and
`freeze` of both skips both. Op-Skip's frozen layers also hold the text before the last visual token; plans of ours do so only
with `Plan.freeze_text_before`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlens_jax.errors import UserError, suggest
from rlens_jax.files import quoted
from rlens_jax.flops import DecoderSizes
from rlens_jax.plans import MOST_LAYERS, SKIP, Level, Plan

_FOLDER = Path(__file__).parent / "policies"
SOURCES = ("opskip", "shortv")
"""Names before the colon, and of the files in rlens_jax/policies/."""
_ACTIONS: Mapping[str, tuple[str, ...]] = {"attention_only": ("ffn",), "ffn_only": ("attention",), "freeze": ("attention", "ffn")}
"""What visual tokens skip in the layers of each list of Op-Skip."""
_FIELDS: Mapping[str, type] = {
    "model_family": str,
    "num_layers": int,
    "checkpoint": str,
    "preset": int,
    "budget": int,
    **dict.fromkeys(_ACTIONS, list),
    "freeze_scope": str,
    "mlp_chunk_size": int,
    "rmsnorm_backend": str,
    "source": str,
}
"""Of a file of Op-Skip, the required ones first."""
_REQUIRED = ("model_family", "num_layers")
_SCOPES = ("prefix_through_visual", "visual")
"""What a frozen layer holds in their runs; the second one is that of an earlier state of their repository."""


@dataclass(frozen=True)
class MadeFor:
    """The model that a policy was made for, and what its authors' own runs do besides."""

    name: str
    """The authors' name of the checkpoint or of its family."""
    model_type: str
    """As in config.json."""
    num_layers: int
    widths: tuple[int, int] | None
    """D and F; None if the policy does not say."""
    holds_text: bool
    """Whether the authors' frozen layers also hold the text before the last visual token."""

    def validate(self, sizes: DecoderSizes, model_type: str | None) -> None:
        """Raise UserError if a model is another one. `model_type` None is not compared."""
        wanted = f"the policy is for {self.name}"
        if sizes.num_layers != self.num_layers:
            raise UserError(f"{wanted}, which has {self.num_layers} layers, but this model has {sizes.num_layers}")
        if model_type not in (None, self.model_type):
            raise UserError(f"{wanted}, a model of the type {self.model_type}, but this one is of the type {model_type}")
        if self.widths not in (None, widths := (sizes.width, sizes.ffn_width)):
            raise UserError(f"{wanted}, whose states and FFN have the widths {self.widths}, but this model has {widths}")


Policy = tuple[Plan, MadeFor | None]
"""A plan of somebody else. A list of layers names no model."""


def is_policy_name(text: str) -> bool:
    """Whether a plan is named as `opskip:...` or `shortv:...`."""
    source, colon, _ = text.partition(":")
    return bool(colon) and source in SOURCES


def named_policy(text: str) -> Policy:
    """The policy of a name such as `opskip:llava-1.5-7b/12`. UserError, with the nearest name, if there is none."""
    source, _, name = text.partition(":")
    model, slash, preset = name.partition("/")
    models = _models(source)
    if model not in models:
        raise UserError(f"{source} has no policy for {quoted(model)}{suggest(model, models)}; there are {', '.join(models)}")
    fields = models[model]
    presets = fields.get("presets")
    if presets is None and slash:
        raise UserError(f"{source} has one policy for each model: write {source}:{model}, not {text}")
    if presets is not None and preset not in presets:
        raise UserError(
            f"{source} has no such preset for {model}: add a number, as in {text.rstrip('/0123456789')}"
            f"/{next(iter(presets))}; there are {', '.join(presets)}"
        )
    widths = (fields["width"], fields["ffn_width"])
    made_for = MadeFor(fields["checkpoint"], fields["model_type"], fields["num_layers"], widths, source == "opskip")
    return _plan({"freeze": fields["freeze"], **(presets[preset] if presets is not None else {})}), made_for


def is_policy(value: Any) -> bool:
    """Whether the value of a JSON file is a policy in its authors' own format, and no plan file."""
    return isinstance(value, list) or (isinstance(value, dict) and "model_family" in value)


def policy_of(value: Any) -> Policy:
    """The policy that a JSON file holds in its authors' format. UserError if a field is unknown, missing or wrong."""
    if isinstance(value, list):
        if not value:
            raise UserError("a list of layers to freeze, as ShortV has it, must name a layer")
        return _plan({"freeze": value}), None
    for name in value:
        if name not in _FIELDS:
            raise UserError(f"unknown field {quoted(name)}{suggest(name, _FIELDS)}; those of Op-Skip are {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if name not in value and name in _REQUIRED:
            raise UserError(f"the field {name} is missing; a policy of Op-Skip has {' and '.join(_REQUIRED)}")
        if name in value and type(value[name]) is not kind:
            raise UserError(f"{name} must be of the type {kind.__name__}, not {quoted(value[name])}")
    num_layers, scope = value["num_layers"], value.get("freeze_scope", _SCOPES[0])
    if not 1 <= num_layers <= MOST_LAYERS:
        raise UserError(f"num_layers must be from 1 to {MOST_LAYERS}, not {quoted(num_layers)}")
    if scope not in _SCOPES:
        raise UserError(f"freeze_scope must be {' or '.join(_SCOPES)}, not {quoted(scope)}")
    actions = {action: value.get(action, []) for action in _ACTIONS}
    plan, listed = _plan(actions), sum(map(len, actions.values()))
    if value.get("budget", listed) != listed:
        raise UserError(f"budget is {value['budget']}, but {', '.join(_ACTIONS)} name {listed} layers")
    plan.validate(num_layers)
    known = {fields["checkpoint"]: (fields["width"], fields["ffn_width"]) for fields in _models("opskip").values()}
    checkpoint = value.get("checkpoint", value["model_family"])
    return plan, MadeFor(checkpoint, value["model_family"], num_layers, known.get(checkpoint), scope == _SCOPES[0])


@cache
def _models(source: str) -> Mapping[str, Any]:
    models: Mapping[str, Any] = json.loads((_FOLDER / f"{source}.json").read_text())["models"]
    return models


def _plan(actions: Mapping[str, Any]) -> Plan:
    """The plan of lists of layers by action. UserError, naming layer and lists, if a layer is named twice."""
    named: dict[int, str] = {}
    levels: dict[str, dict[int, Level]] = {"attention": {}, "ffn": {}}
    for action, layers in actions.items():
        for layer in layers:
            if type(layer) is not int or not 0 <= layer < MOST_LAYERS:
                raise UserError(f"{action}: a layer must be a whole number from 0 to {MOST_LAYERS - 1}, not {quoted(layer)}")
            if layer in named:
                raise UserError(f"{action} names layer {layer}, which {named[layer]} names already")
            named[layer] = action
            for operator in _ACTIONS[action]:
                levels[operator][layer] = SKIP
    return Plan.of(levels["attention"], levels["ffn"])
