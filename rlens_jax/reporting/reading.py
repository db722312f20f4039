"""The files of a finished ranking run, checked when they are read so that the report can rely on them."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rlens_jax.errors import UserError
from rlens_jax.files import check_schema, field_error, read_json
from rlens_jax.search.ranking_file import RANKING, check_layers, read_ranking

TIMING, EXAMPLES = "timing.json", "examples.json"


@dataclass(frozen=True)
class RunFiles:
    """A finished run, as JSON values of its files.

    Attributes:
        name: the report's name for the run.
        ranking: fields of ranking.json, see `search/ranking.schema.json`.
        timing: fields of timing.json, see `timing.schema.json`.
        examples: fields of examples.json, see `examples.schema.json`; None without that file.
    """

    name: str
    ranking: Mapping[str, Any]
    timing: Mapping[str, Any]
    examples: Mapping[str, Any] | None

    @property
    def num_layers(self) -> int:
        """L."""
        return self.ranking["model"]["num_layers"]


def read_run(folder: Path) -> RunFiles:
    """Read the files of a finished run.

    Raises:
        UserError: naming file and field: the folder has no finished run, or a file cannot be read, is not JSON, does not
            follow its schema, or contradicts itself or another file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the output folder of a ranking run")
    if not (folder / RANKING).is_file():
        raise UserError(f"{folder} has no {RANKING}: no ranking run was finished there")
    ranking = read_ranking(folder / RANKING).fields
    timing = _read_checked(folder / TIMING, "timing.schema.json")
    for plan in timing["prefill"]:
        if plan not in ranking["savings"]:
            raise field_error(folder / TIMING, f"prefill.{plan}", f"{RANKING} has no such plan")
    return RunFiles(folder.resolve().name, ranking, timing, read_examples(folder, ranking))


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
            if not _is_jpeg(image["base64"]):
                raise field_error(path, f"examples[{number}].images[{place}].base64", "is not a JPEG in base64")
    return fields


def _read_checked(path: Path, schema: str) -> Mapping[str, Any]:
    value = read_json(path)
    check_schema(value, Path(__file__).with_name(schema), path)
    return value


def _is_jpeg(encoded: str) -> bool:
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["JPEG"]) as image:
            image.load()
    # Pillow's decoders raise errors of nearly every type for broken files, not only OSError.
    except Exception:
        return False
    return True
