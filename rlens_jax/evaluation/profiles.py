"""Settings of other harnesses by name, as `vlmevalkit@e8e78f05`, and how the questions of a dataset are asked.

A profile is a JSON file in rlens_jax/profiles/ with its source. By model it says which entry of the harness it describes,
settings that hold for all benchmarks and those of single ones, the wording of prompts, and what is not reproduced here.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from rlens_jax.config import LIMITS
from rlens_jax.data.images import doubled, enlarged
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError, suggest
from rlens_jax.families.generation_config import Decoding

_FOLDER = Path(__file__).parents[1] / "profiles"


@dataclass(frozen=True)
class Entry:
    """What a profile says of a model on a benchmark.

    Attributes:
        model: the harness' name of the model.
        limits: of the sizes of images, by names in `LIMITS`.
        max_new_tokens: most tokens of an answer.
        repetition_penalty: None leaves it to the checkpoint.
        system: the system prompt; None leaves it to the chat template.
        double_first: whether the first image of a question is doubled in width and height.
        enlarge: whether small images get a random larger size; see `data.images.enlarged`.
        prompt: the wording; {question}, {A} and {B} stand for a question's own texts.
        not_reproduced: what the harness does otherwise than we can, in words.
    """

    model: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None
    system: str | None = None
    double_first: bool = False
    enlarge: bool = False
    prompt: str | None = None
    not_reproduced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manner:
    """How the questions of a dataset are asked and answered.

    Attributes:
        decoding: lengths and penalty of answers.
        entry: what is asked otherwise than the checkpoint says: by a profile, and by options in its place.
    """

    decoding: Decoding
    entry: Entry = Entry()

    def sample(self, sample: Sample, index: str) -> Sample:
        """The sample with system prompt and images as this says; `index` seeds random sizes. UserError as of `doubled`."""
        images, what = list(sample.images), f"{sample.id}: image"
        if self.entry.double_first:
            images[:1] = [doubled(image, what) for image in images[:1]]
        if self.entry.enlarge:
            images = [enlarged(image, what, f"{index}, {place}") for place, image in enumerate(images)]
        return replace(sample, images=tuple(images), system=self.entry.system)

    def fields(self) -> dict[str, Any]:
        """As JSON values."""
        entry = self.entry
        return {
            "entry": entry.model or None,
            **asdict(self.decoding),
            "system": entry.system,
            "limits": dict(entry.limits),
            "double_first": entry.double_first,
            "enlarge": entry.enlarge,
            "prompt": entry.prompt,
            "not_reproduced": list(entry.not_reproduced),
        }


def check_profile(name: str) -> None:
    """Raise UserError, with the nearest name, if there is no such profile."""
    names = sorted(path.stem for path in _FOLDER.glob("*.json"))
    if name not in names:
        raise UserError(f"--profile {name}: there is no such profile{suggest(name, names)}; there are {', '.join(names)}")


def find_entry(profile: str, model_type: str, dataset: str) -> Entry:
    """What a profile says of models of a type on a dataset; of other data than its benchmarks, what holds for all.

    Raises:
        UserError: there is no such profile, or it has no models of the type.
    """
    check_profile(profile)
    content = _read(profile)
    models = content["models"]
    if model_type not in models:
        raise UserError(f"--profile {profile}: nothing is known of models of the type {model_type}; of {', '.join(models)} it is")
    model = models[model_type]
    settings = {**model["settings"], **model["benchmarks"].get(dataset, {})}
    limits = {name: settings.pop(name) for name in LIMITS if name in settings}
    prompts = {name: group["text"] for group in content["prompts"][model["prompts"]] for name in group["benchmarks"]}
    notes = (*model["not_reproduced"], *(note for name, note in content["with_setting"].items() if name in settings))
    return Entry(model["entry"], limits, prompt=prompts.get(dataset), not_reproduced=notes, **settings)


@cache
def _read(profile: str) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads((_FOLDER / f"{profile}.json").read_text(encoding="utf-8"))
    return content
