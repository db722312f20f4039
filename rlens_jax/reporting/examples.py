"""`examples.json`: a few held-out samples with the answers generated dense and under a plan, for the HTML report.

It follows `examples.schema.json` beside this file. Thumbnails are kept inside it: one file is there whole or not at all.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rlens_jax.files import json_text, replace_file
from rlens_jax.plan import Plan
from rlens_jax.reporting.reading import EXAMPLES

SCHEMA = "rlens-examples/1"
MAX_EXAMPLES, MAX_IMAGES = 8, 2
"""Most examples of a file, and most thumbnails of an example; with `_BYTES` they bound the file to about 0.5 MB."""
_SIDE = 448
_BYTES = 24_000
_QUALITIES = (85, 70, 55, 40, 25)


@dataclass(frozen=True)
class Answer:
    """What a model generated: `text`, and its `score` in [0, 1] by the dataset's metric (1: right)."""

    text: str
    score: float


@dataclass(frozen=True)
class Example:
    """One held-out sample, answered twice.

    Attributes:
      id, dataset, question: the sample's.
      references: any of them is right.
      images: decoded images of any size and mode; the first `MAX_IMAGES` are kept as thumbnails.
      dense: the answer of the model with nothing reduced.
      reduced: the answer under the file's plan.
    """

    id: str
    dataset: str
    question: str
    references: tuple[str, ...]
    images: tuple[Image.Image, ...]
    dense: Answer
    reduced: Answer


def write_examples(folder: Path, examples: Sequence[Example], *, plan: Plan, model_hash: str, data_hash: str) -> Path:
    """Write examples.json, whole or not at all; `write_report` in the same folder then shows it.

    Args:
      folder: of the run.
      examples: at most `MAX_EXAMPLES`.
      plan: under which the reduced answers were generated.
      model_hash, data_hash: as in ranking.json, so that examples of another run are noticed.

    Raises:
      UserError: when the folder does not take a file.
      ValueError: for too many examples.
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
    """A JPEG of at most `_SIDE` pixels a side and about `_BYTES` bytes: coarser where an image is rich in detail."""
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
