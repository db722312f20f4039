"""Files that reports of finished ranking runs read, checked so that the report can rely on them; examples.json is also written.

`examples.json` has a few held-out samples with the answers generated dense and under a plan. It contains the thumbnails, so no
image can be missing. The schemas of the files are in this folder and in `search`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from rlens_jax.data.images import Transparency, load_images
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.files import check_schema, field_error, json_text, read_json, replace_file
from rlens_jax.plans import Plan
from rlens_jax.reporting.seen_files import read_seen
from rlens_jax.reporting.thumbnails import is_jpeg, thumbnail
from rlens_jax.search.front import FRONT, read_front
from rlens_jax.search.ranking_file import RANKING, check_layers, read_ranking

TIMING, EXAMPLES = "timing.json", "examples.json"
EXAMPLES_SCHEMA = "rlens-examples/1"
NUM_EXAMPLES = 6
"""Samples that a ranking run shows."""
MAX_EXAMPLES, MAX_IMAGES = 8, 2
"""Most examples per file and thumbnails per example. With the bytes of a thumbnail they limit the file to about 0.5 MB."""


@dataclass(frozen=True)
class RunFiles:
    """A run: its name in the report, and the fields of ranking.json, timing.json and, if present, examples.json."""

    name: str
    ranking: Mapping[str, Any]
    timing: Mapping[str, Any]
    examples: Mapping[str, Any] | None
    front: Mapping[str, Any] | None = None
    """The fields of front.json, if the run also searched the best plan under a budget."""
    seen: Mapping[str, Any] | None = None
    """The fields of seen.json, if the run also looked at single samples."""

    @property
    def num_layers(self) -> int:
        """L."""
        return self.ranking["model"]["num_layers"]


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run that has found a ranking.

    UserError, naming file and field, if a file is missing, does not follow its schema, or contradicts itself or another file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the output folder of a ranking run")
    if not (folder / RANKING).is_file():
        raise UserError(f"{folder} has no {RANKING}: no ranking run was finished there")
    ranking = read_ranking(folder / RANKING).fields
    timing = _read_checked(folder / TIMING, "timing.schema.json")
    for plan in timing["prefill"]:
        if plan not in ranking.get("savings", {}):
            raise field_error(folder / TIMING, f"prefill.{plan}", f"{RANKING} has no such plan")
    name, examples, joint = folder.resolve().name, read_examples(folder, ranking), read_joint(folder, ranking)
    return RunFiles(name, ranking, timing, examples, joint, read_seen(folder, ranking))


def read_examples(folder: Path, ranking: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fields of a folder's examples.json, None without that file.

    Raises:
        UserError: the file cannot be read, is wrong, or has the examples of another run than `ranking`.
    """
    path = folder / EXAMPLES
    if not path.exists():
        return None
    fields = _read_checked(path, "examples.schema.json")
    for name, part in (("model_hash", "model"), ("data_hash", "data")):
        if fields[name] != ranking[part]["hash"]:
            raise field_error(path, name, f"differs from {RANKING}; these are the examples of another run")
    for operator, layers in fields["plan"].items():
        check_layers(path, f"plan.{operator}", layers, ranking["model"]["num_layers"])
    for number, example in enumerate(fields["examples"]):
        for place, image in enumerate(example["images"]):
            if not is_jpeg(image["base64"]):
                raise field_error(path, f"examples[{number}].images[{place}].base64", "is not a JPEG in base64")
    return fields


def read_joint(folder: Path, ranking: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fields of a folder's front.json, None without that file. UserError if it is wrong or of another run than `ranking`."""
    path = folder / FRONT
    if not path.exists():
        return None
    fields = read_front(path)
    for name, part in (("model_hash", "model"), ("data_hash", "data")):
        if fields[name] != ranking[part]["hash"]:
            raise field_error(path, name, f"differs from {RANKING}; this is the front of another run")
    return fields


def _read_checked(path: Path, schema: str) -> Mapping[str, Any]:
    value = read_json(path)
    check_schema(value, Path(__file__).with_name(schema), path)
    return value


@dataclass(frozen=True)
class Answer:
    """A generated answer, and its score in [0, 1] by the dataset's metric (1: right)."""

    text: str
    score: float


@dataclass(frozen=True)
class Example:
    """One held-out sample with two answers.

    Attributes:
        id, dataset, question: of the sample.
        references: right answers.
        images: decoded images of any size and mode; the file keeps thumbnails of the first `MAX_IMAGES`.
        dense: the dense model's answer.
        reduced: the answer under the plan of the file.
    """

    id: str
    dataset: str
    question: str
    references: tuple[str, ...]
    images: tuple[Image.Image, ...]
    dense: Answer
    reduced: Answer

    @classmethod
    def of(cls, sample: Sample, transparency: Transparency, dense: Answer, reduced: Answer) -> "Example":
        """The example of a sample, with its images as the model reads them."""
        images = tuple(load_images(replace(sample, images=sample.images[:MAX_IMAGES]), transparency))
        return cls(sample.id, sample.dataset, sample.question, sample.answers, images, dense, reduced)


def choose_samples(samples: Sequence[Sample]) -> list[Sample]:
    """The samples to show of a split: the first ones of all datasets in turn."""
    by_dataset: dict[str, list[Sample]] = {}
    for sample in samples:
        by_dataset.setdefault(sample.dataset, []).append(sample)
    rounds = max(map(len, by_dataset.values()))
    in_turn = [members[i] for i in range(rounds) for members in by_dataset.values() if i < len(members)]
    return in_turn[:NUM_EXAMPLES]


def write_examples(folder: Path, examples: Sequence[Example], plan: Plan, *, model_hash: str, data_hash: str) -> Path:
    """Write examples.json, which `write_report` in the same folder then shows. UserError if it cannot be written.

    Args:
        folder: output folder of the run.
        examples: at most `MAX_EXAMPLES`.
        plan: the plan of the reduced answers.
        model_hash, data_hash: as in ranking.json, to detect examples of another run.
    """
    if len(examples) > MAX_EXAMPLES:
        raise ValueError(f"{len(examples)} examples; a report shows at most {MAX_EXAMPLES}")
    value = {
        "schema": EXAMPLES_SCHEMA,
        "model_hash": model_hash,
        "data_hash": data_hash,
        "plan": plan.fields(),
        "examples": [
            {
                "id": example.id,
                "dataset": example.dataset,
                "question": example.question,
                "references": list(example.references),
                "dense": asdict(example.dense),
                "reduced": asdict(example.reduced),
                "images": [thumbnail(image) for image in example.images[:MAX_IMAGES]],
            }
            for example in examples
        ],
    }
    return replace_file(folder / EXAMPLES, json_text(value).encode())
