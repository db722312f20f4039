"""`examples.json`: a few held-out samples with the answers generated dense and under a plan, for the HTML report.

The file follows `examples.schema.json` in this folder. It contains the thumbnails, so no image can be missing.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rlens_jax.data.samples import Sample, load_image
from rlens_jax.files import json_text, replace_file
from rlens_jax.plan import Plan
from rlens_jax.reporting.reading import EXAMPLES

SCHEMA = "rlens-examples/1"
NUM_EXAMPLES = 6
"""Samples that a ranking run shows."""
MAX_EXAMPLES, MAX_IMAGES = 8, 2
"""Most examples per file and thumbnails per example. With `_BYTES` they limit the file to about 0.5 MB."""
_SIDE = 448
_BYTES = 24_000
_QUALITIES = (85, 70, 55, 40, 25)


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
    def of(cls, sample: Sample, dense: Answer, reduced: Answer) -> "Example":
        """The example of a sample, with its images read."""
        images = tuple(load_image(image, sample.id) for image in sample.images[:MAX_IMAGES])
        return cls(sample.id, sample.dataset, sample.question, sample.answers, images, dense, reduced)


def choose_samples(samples: Sequence[Sample]) -> list[Sample]:
    """The samples to show of a split: the first ones of all datasets in turn."""
    by_dataset: dict[str, list[Sample]] = {}
    for sample in samples:
        by_dataset.setdefault(sample.dataset, []).append(sample)
    rounds = max(map(len, by_dataset.values()))
    in_turn = [members[i] for i in range(rounds) for members in by_dataset.values() if i < len(members)]
    return in_turn[:NUM_EXAMPLES]


def write_examples(folder: Path, examples: Sequence[Example], *, plan: Plan, model_hash: str, data_hash: str) -> Path:
    """Write examples.json, which `write_report` in the same folder then shows.

    Args:
        folder: output folder of the run.
        examples: at most `MAX_EXAMPLES` examples.
        plan: the plan of the reduced answers.
        model_hash, data_hash: as in ranking.json, to detect examples of another run.

    Raises:
        UserError: the file cannot be written.
        ValueError: there are too many examples.
    """
    if len(examples) > MAX_EXAMPLES:
        raise ValueError(f"{len(examples)} examples; a report shows at most {MAX_EXAMPLES}")
    value = {
        "schema": SCHEMA,
        "model_hash": model_hash,
        "data_hash": data_hash,
        "plan": {"attention": list(plan.attention), "ffn": list(plan.ffn)},
        "examples": [
            {
                "id": example.id,
                "dataset": example.dataset,
                "question": example.question,
                "references": list(example.references),
                "dense": _answer(example.dense),
                "reduced": _answer(example.reduced),
                "images": [_thumbnail(image) for image in example.images[:MAX_IMAGES]],
            }
            for example in examples
        ],
    }
    return replace_file(folder / EXAMPLES, json_text(value).encode())


def _answer(answer: Answer) -> dict[str, str | float]:
    return {"text": answer.text, "score": answer.score}


def _thumbnail(image: Image.Image) -> dict[str, str | int]:
    """A JPEG of at most `_SIDE` pixels a side and about `_BYTES` bytes: coarser if the image is rich in detail."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= _BYTES:
            break
    return {
        "media_type": "image/jpeg",
        "width": small.width,
        "height": small.height,
        "base64": base64.b64encode(buffer.getvalue()).decode(),
    }
