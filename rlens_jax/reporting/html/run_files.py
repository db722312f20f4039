"""A run folder's files, read and checked, so that what draws them need not look back."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from PIL import Image

from rlens_jax.errors import UserError
from rlens_jax.files import parse_json, read_text

RANKING, TIMING, EXAMPLES = "ranking.json", "timing.json", "examples.json"
_SCHEMAS = {
    RANKING: "ranking.schema.json",
    TIMING: "timing.schema.json",
    EXAMPLES: "examples.schema.json",
}
_LONGEST_COMPLAINT = 160


@dataclass(frozen=True)
class RunFiles:
    """A finished run as its files tell it.

    Attributes:
      name: what the report calls the run.
      ranking: ranking.json, as `ranking.schema.json` describes it.
      timing: timing.json, as `timing.schema.json`.
      examples: examples.json, as `examples.schema.json`; None when the run has none.
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
    """The files of a finished run.

    Raises:
      UserError: naming file and field: no finished run in the folder, a file that cannot be read, is no JSON, does not
        follow its schema, or contradicts itself or another.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the output folder of a ranking run")
    if not (folder / RANKING).is_file():
        raise UserError(f"{folder} has no {RANKING}: no ranking run was finished there")
    texts = {name: read_text(folder / name) for name in (RANKING, TIMING)}
    if (folder / EXAMPLES).exists():
        texts[EXAMPLES] = read_text(folder / EXAMPLES)
    return parse_run(folder.resolve().name, folder, texts)


def parse_run(name: str, folder: Path, texts: Mapping[str, str]) -> RunFiles:
    """Like `read_run`, from the texts of the files; `folder` is where errors say that they are."""
    values = {file: _parsed(folder / file, text, _SCHEMAS[file]) for file, text in texts.items()}
    run = RunFiles(name, values[RANKING], values[TIMING], values.get(EXAMPLES))
    _check_ranking(folder / RANKING, run.ranking)
    _check_plans(folder / TIMING, "prefill", run.timing["prefill"], run.ranking["savings"])
    if run.examples is not None:
        _check_examples(folder / EXAMPLES, run.examples, run.ranking)
    return run


def _parsed(path: Path, text: str, schema: str) -> Any:
    value = parse_json(text, path)
    found = best_match(_validator(schema).iter_errors(value))
    if found is not None:
        message = " ".join(found.message.split())
        if len(message) > _LONGEST_COMPLAINT:  # it begins with the whole wrong value
            message = f"{message[: _LONGEST_COMPLAINT // 2]} ... {message[-_LONGEST_COMPLAINT // 2 :]}"
        raise _wrong(path, found.json_path.removeprefix("$").removeprefix("."), message)
    return value


@cache
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(files("rlens_jax.reporting").joinpath(schema).read_text(encoding="utf-8")))


def _wrong(path: Path, field: str, message: str) -> UserError:
    return UserError(f"{path}: {field}: {message}" if field else f"{path}: {message}")


def _check_ranking(path: Path, ranking: Mapping[str, Any]) -> None:
    """What a schema cannot say: that orders, plans, rounds and points are about the same layers and datasets."""
    num_layers, rankings = ranking["model"]["num_layers"], ranking["rankings"]
    datasets = list(ranking["dense"]["test"])
    for field, value in (
        ("dense.validation", ranking["dense"]["validation"]),
        ("data.samples.validation", ranking["data"]["samples"]["validation"]),
        ("data.samples.test", ranking["data"]["samples"]["test"]),
    ):
        _check_same(path, field, value, datasets, "datasets")
    for part in ("search", "held_out"):
        _check_same(path, part, ranking[part], rankings, "operators")
    expected = [*rankings, "both"] if len(rankings) == 2 else [*rankings]
    _check_same(path, "savings", ranking["savings"], expected, "plans")
    for operator, order in rankings.items():
        _check_order(path, f"rankings.{operator}", order, num_layers)
        search, held_out = ranking["search"][operator], ranking["held_out"][operator]
        for number, round_ in enumerate(search["rounds"]):
            field = f"search.{operator}.rounds[{number}]"
            layers = [candidate["layer"] for candidate in round_["candidates"]]
            _check_layers(path, f"{field}.candidates", layers, num_layers)
            if round_["chosen"] not in layers:
                raise _wrong(path, f"{field}.chosen", f"layer {round_['chosen']} was no candidate")
            for place, candidate in enumerate(round_["candidates"]):
                _check_same(path, f"{field}.candidates[{place}].metrics", candidate["metrics"], datasets, "datasets")
        _check_layers(path, f"search.{operator}.base", search["base"][operator], num_layers)
        for strategy, curve in held_out["curves"].items():
            field = f"held_out.{operator}.curves.{strategy}"
            _check_order(path, f"{field}.order", curve["order"], num_layers)
            if [point["num_reduced"] for point in curve["points"]] != list(range(num_layers + 1)):
                raise _wrong(path, f"{field}.points", f"must be of 0, 1, ... {num_layers} reduced layers")
        points = held_out["random"]["num_reduced"]
        for number, random in enumerate(held_out["random"]["rankings"]):
            if len(random["means"]) != len(points):
                field = f"held_out.{operator}.random.rankings[{number}].means"
                raise _wrong(path, field, f"must be {len(points)} numbers, not {len(random['means'])}")
        if any(point > num_layers for point in points):
            raise _wrong(path, f"held_out.{operator}.random.num_reduced", f"the model has {num_layers} layers")
    for name, saving in ranking["savings"].items():
        for operator, layers in saving["plan"].items():
            _check_layers(path, f"savings.{name}.plan.{operator}", layers, num_layers)


def _check_examples(path: Path, examples: Mapping[str, Any], ranking: Mapping[str, Any]) -> None:
    for name, part in (("model_hash", "model"), ("data_hash", "data")):
        if examples[name] != ranking[part]["hash"]:
            raise _wrong(path, name, f"not that of {RANKING}; these are the examples of another run")
    for operator, layers in examples["plan"].items():
        _check_layers(path, f"plan.{operator}", layers, ranking["model"]["num_layers"])
    for number, example in enumerate(examples["examples"]):
        for place, image in enumerate(example["images"]):
            if not _is_jpeg(image["base64"]):
                raise _wrong(path, f"examples[{number}].images[{place}].base64", "is no JPEG in base64")


def _is_jpeg(encoded: str) -> bool:
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["JPEG"]) as image:
            image.load()
    # Pillow's decoders raise errors of nearly every type for broken files, not only OSError.
    except Exception:
        return False
    return True


def _check_order(path: Path, field: str, order: Sequence[int], num_layers: int) -> None:
    if sorted(order) != list(range(num_layers)):
        raise _wrong(path, field, f"must hold each of the layers 0 to {num_layers - 1} once")


def _check_layers(path: Path, field: str, layers: Iterable[int], num_layers: int) -> None:
    for layer in layers:
        if layer >= num_layers:
            raise _wrong(path, field, f"there is no layer {layer}; the model has {num_layers}")


def _check_same(path: Path, field: str, found: Iterable[str], expected: Iterable[str], what: str) -> None:
    if set(found) != set(expected):
        raise _wrong(path, field, f"must have the {what} {', '.join(expected)}, not {', '.join(found)}")


def _check_plans(path: Path, field: str, found: Iterable[str], known: Iterable[str]) -> None:
    for name in found:
        if name not in set(known):
            raise _wrong(path, f"{field}.{name}", f"{RANKING} has no such plan")
