"""Bundles: a folder with another framework's inputs and results, format "rlens-reference/1".

`manifest.json`:

    format      "rlens-reference/1"
    model       a name for people
    family      `model_type` of the model's config.json
    framework   name, version, and more if wanted
    dtype       the reference's compute dtype, for people
    cases       one or more of: file, plan {attention, ffn: lists of layers}, attention_range, active_fraction,
                probe_fraction, probe, window

Further fields are allowed, shown in the report and ignored. Each case's file is a safetensors file in the folder, with

    (inputs)                    under Hugging Face's names, right-padded, such as input_ids int [B, T]
    logits                      float32 [B, T, V], or [B, n, V] with
    logits_positions            int [B, n]: positions in the sequence
    kept_units.<layer>          optional, int [B, U]: then used in that layer instead of our own choice
    hidden_states.<layer>       optional, float [B, T, D]: what decoder layer <layer> (from 0 on) hands to the next, before any
                                final norm
    hidden_states.<layer>.attention   optional, likewise within the layer, after attention and before the FFN

and no other tensor. Further inputs are those of the family's file in rlens_jax/validation, such as qwen2_vl.py.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlens_jax.errors import UserError, suggest
from rlens_jax.families.hf_config import read_json
from rlens_jax.files import new_folder
from rlens_jax.plan import OPERATORS, Operator, Plan, Reduction

FORMAT = "rlens-reference/1"
MANIFEST = "manifest.json"
FIELDS = ("format", "model", "family", "framework", "dtype", "cases")
REDUCTION_FIELDS = ("attention_range", "active_fraction", "probe_fraction", "probe", "window")
CASE_FIELDS = ("file", "plan", *REDUCTION_FIELDS)
LOGITS, POSITIONS = "logits", "logits_positions"
KEPT = re.compile(r"kept_units\.(0|[1-9]\d*)")
STATES = re.compile(r"hidden_states\.(0|[1-9]\d*)(\.attention)?")
RESULT_NAMES = (
    LOGITS,
    POSITIONS,
    "kept_units.<layer>",
    "hidden_states.<layer>",
    "hidden_states.<layer>.attention",
)


@dataclass(frozen=True)
class Case:
    """A file of a bundle, and what was computed in it."""

    file: str
    plan: Plan
    reduction: Reduction
    further: Mapping[str, Any]
    """Fields that the format does not know."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself."""

    folder: Path
    model: str
    family: str
    framework: Mapping[str, Any]
    dtype: str
    cases: tuple[Case, ...]
    further: Mapping[str, Any]
    """Fields that the format does not know."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, checked.

    Raises:
        UserError: no such folder, another format, or a field that is missing or cannot be used.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a bundle is a folder with {MANIFEST}")
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{path}: no such file; a bundle is a folder with {MANIFEST}")
    fields = read_json(path)
    where = str(path)
    if "format" in fields and fields["format"] != FORMAT:
        raise UserError(f"{where}: has the format {fields['format']!r}, this version reads {FORMAT!r}")
    _require(fields, FIELDS, where)
    for name, kind in (("model", str), ("family", str), ("framework", dict), ("dtype", str), ("cases", list)):
        if not isinstance(fields[name], kind):
            raise UserError(f"{where}: {name} must be {_KINDS[kind]}, not {fields[name]!r}")
    _require(fields["framework"], ("name", "version"), f"{where}: framework")
    if not fields["cases"]:
        raise UserError(f"{where}: cases is empty; a bundle has one or more")
    cases = tuple(_read_case(case, f"{where}: case {number}") for number, case in enumerate(fields["cases"]))
    further = {name: value for name, value in fields.items() if name not in FIELDS}
    return Manifest(folder, fields["model"], fields["family"], fields["framework"], fields["dtype"], cases, further)


_KINDS = {str: "a text", dict: "an object", list: "a list"}


def _require(fields: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in fields:
            unknown = [given for given in fields if given not in names]
            near = suggest(name, unknown)
            raise UserError(f"{where}: the field {name} is missing" + near.replace("did you mean", "is it"))


def _read_case(fields: Any, where: str) -> Case:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: must be an object, not {fields!r}")
    _require(fields, CASE_FIELDS, where)
    file = fields["file"]
    if not isinstance(file, str) or Path(file).name != file:
        raise UserError(f"{where}: file must be the name of a file in the bundle, not {file!r}")
    where = f"{where} ({file})"
    plan = fields["plan"]
    if not isinstance(plan, dict):
        raise UserError(f"{where}: plan must be an object, not {plan!r}")
    _require(plan, OPERATORS, f"{where}: plan")
    for name in plan:
        if name not in OPERATORS:
            raise UserError(f"{where}: plan has no operator {name!r}{suggest(name, OPERATORS)}")
    try:
        checked = Plan(**plan)
        reduction = Reduction(**{name: fields[name] for name in REDUCTION_FIELDS})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Case(file, checked, reduction, {name: fields[name] for name in fields if name not in CASE_FIELDS})


class CaseFile:
    """The tensors of a case; each is read when it is asked for.

    Args:
        path: of the safetensors file.
        handle: the opened file.
        inputs: which inputs the model's family has.

    Raises:
        UserError: an unknown tensor, or no logits.
    """

    def __init__(self, path: Path, handle: Any, inputs: Sequence[str]):
        self.path = path
        self._handle = handle
        self.names = list(handle.keys())
        for name in self.names:
            if name not in (*inputs, LOGITS, POSITIONS) and not KEPT.fullmatch(name) and not STATES.fullmatch(name):
                near = suggest(name, [*inputs, *RESULT_NAMES])
                raise UserError(
                    f"{path}: the tensor {name} is not known{near}; known are {', '.join([*inputs, *RESULT_NAMES])}"
                )
        if LOGITS not in self.names:
            raise UserError(f"{path}: holds no {LOGITS}; without them there is nothing to compare")
        self.inputs = {name: self.read(name) for name in self.names if name in inputs}

    def read(self, name: str) -> np.ndarray:
        """A tensor; floats as float32, whole numbers as int64."""
        array = self._handle.get_tensor(name)
        return array.astype(np.int64 if array.dtype.kind in "iub" else np.float32)

    def dtype(self, name: str) -> str:
        """As safetensors calls it."""
        return str(self._handle.get_slice(name).get_dtype())

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._handle.get_slice(name).get_shape())

    def layers(self, pattern: re.Pattern[str]) -> dict[str, int]:
        """The tensors of `KEPT` or `STATES` by name, each with its layer."""
        matches = {name: pattern.fullmatch(name) for name in self.names}
        return {name: int(found[1]) for name, found in matches.items() if found}


@contextmanager
def open_case(folder: Path, case: Case, inputs: Sequence[str]) -> Iterator[CaseFile]:
    """The file of a case; UserError when it is missing, broken or not as `CaseFile` wants it."""
    path = folder / case.file
    try:
        handle = safe_open(path, framework="np")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {MANIFEST} names it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from None
    with handle:
        yield CaseFile(path, handle, inputs)


def states_name(layer: int, operator: Operator) -> str:
    """What the states after a layer's attention, or after its FFN and so the layer, are called."""
    return f"hidden_states.{layer}" + (".attention" if operator == "attention" else "")


@contextmanager
def new_bundle(
    folder: Path, *, model: str, family: str, framework: Mapping[str, str], dtype: str
) -> Iterator["BundleWriter"]:
    """A bundle to fill, which appears whole or not at all; UserError when the folder exists or cannot be made."""
    with new_folder(folder) as unfinished:
        writer = BundleWriter(unfinished)
        yield writer
        manifest = {
            "format": FORMAT,
            "model": model,
            "family": family,
            "framework": dict(framework),
            "dtype": dtype,
            "cases": writer.cases,
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


class BundleWriter:
    """Adds cases to a bundle."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.cases: list[dict[str, Any]] = []

    def add(self, plan: Plan, reduction: Reduction, tensors: Mapping[str, np.ndarray]) -> None:
        """The next case."""
        file = f"case_{len(self.cases):02}.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, self._folder / file)
        (self._folder / file).chmod(0o644)  # safetensors makes it readable for its owner only
        layers = {operator: list(plan.layers(operator)) for operator in OPERATORS}
        self.cases.append({"file": file, "plan": layers, **asdict(reduction)})
