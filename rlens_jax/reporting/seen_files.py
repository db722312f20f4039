"""`seen.json`: the redundancy of a few held-out samples, with thumbnails, so that a report needs no other file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlens_jax.data.samples import Sample
from rlens_jax.files import check_schema, field_error, json_text, read_json, replace_file
from rlens_jax.plans import Reduction
from rlens_jax.reporting.thumbnails import is_jpeg, thumbnail
from rlens_jax.search.ranking_file import RANKING

SEEN = "seen.json"
SEEN_SCHEMA = "rlens-seen/1"
_DIGITS = 5


@dataclass(frozen=True)
class SeenSample:
    """A held-out sample; its first image is shown.

    Attributes:
        sample: the sample.
        image: its first image, as the model reads it.
        grid: rows and columns of this image's visual tokens, None if they are no grid over the whole image.
        attention: float[L], the share of the text's attention that goes to visual tokens.
        overlap: float[L], the share of the kept units that another sample keeps, too, mean over the others.
        attention_map, survival_map: float[tokens of this image], means over the layers; see `engine.seen.Seen`.
    """

    sample: Sample
    image: Image.Image
    grid: tuple[int, int] | None
    attention: np.ndarray
    overlap: np.ndarray
    attention_map: np.ndarray
    survival_map: np.ndarray


def write_seen(
    folder: Path, samples: Sequence[SeenSample], reduction: Reduction, ffn_width: int, *, model_hash: str, data_hash: str
) -> Path:
    """Write seen.json, which `write_report` in the same folder then shows. UserError if it cannot be written.

    `reduction` says how many of `ffn_width` units are kept; the hashes are those of ranking.json.
    """
    value = {
        "schema": SEEN_SCHEMA,
        "model_hash": model_hash,
        "data_hash": data_hash,
        "units": reduction.kept_units(ffn_width),
        "ffn_width": ffn_width,
        "samples": [
            {
                "id": each.sample.id,
                "dataset": each.sample.dataset,
                "question": each.sample.question,
                "image": thumbnail(each.image),
                "grid": None if each.grid is None else list(each.grid),
                **{
                    name: np.round(getattr(each, name).astype(float), _DIGITS).tolist()
                    for name in ("attention", "overlap", "attention_map", "survival_map")
                },
            }
            for each in samples
        ],
    }
    return replace_file(folder / SEEN, json_text(value).encode())


def read_seen(folder: Path, ranking: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fields of a folder's seen.json, None without that file.

    Raises:
        UserError: the file cannot be read, is wrong, or is of another run than `ranking`.
    """
    path, layers = folder / SEEN, ranking["model"]["num_layers"]
    if not path.exists():
        return None
    fields: Mapping[str, Any] = read_json(path)
    check_schema(fields, Path(__file__).with_name("seen.schema.json"), path)
    for name, part in (("model_hash", "model"), ("data_hash", "data")):
        if fields[name] != ranking[part]["hash"]:
            raise field_error(path, name, f"differs from {RANKING}; these are the samples of another run")
    for number, sample in enumerate(fields["samples"]):
        where, tokens = f"samples[{number}]", len(sample["attention_map"])
        if not is_jpeg(sample["image"]["base64"]):
            raise field_error(path, f"{where}.image.base64", "is not a JPEG in base64")
        for name in ("attention", "overlap"):
            if len(sample[name]) != layers:
                raise field_error(path, f"{where}.{name}", f"must have a number for each of the {layers} layers")
        if len(sample["survival_map"]) != tokens or (sample["grid"] is not None and int(np.prod(sample["grid"])) != tokens):
            raise field_error(path, where, "its maps and grid differ in the number of tokens")
    return fields
