"""Bundles: folders with inputs and results of another framework, format "rlens-reference/1".

`manifest.json`:

    format      "rlens-reference/1"
    model       name of the model, for the report
    family      `model_type` in the config.json of the model
    framework   name, version, and optional fields
    dtype       compute dtype of the framework, for the report
    cases       one or more of: file, plan {attention, ffn: lists of layers, and the optional attention_levels, ffn_levels
                and freeze of a plan file}, attention_range, active_fraction, probe_fraction, probe, window

    constants   optional: sizes and constants of the model by the names of our configs, such as {"decoder.norm_eps": 1e-6};
                `rlens_jax.parity.constants` compares those that a bundle names

Other fields are allowed; they appear in the report and have no effect. The file of each case is a safetensors file in the folder
with these tensors, and no others:

    (inputs)                    named as in Hugging Face's models, right-padded, such as input_ids int [B, T]; the image inputs
                                of each family are in rlens_jax/families/FAMILY/reference.py
    logits                      float32 [B, T, V], or [B, positions, V] with
    logits_positions            int [B, positions]: positions in the sequence
    kept_units.<layer>          optional, int [B, U]: units that our model uses in that layer instead of its own selection
    embeddings                  optional, float [B, T, D]: states that enter the first layer
    hidden_states.<layer>       optional, float [B, T, D]: states after decoder layer <layer> (from 0), before any final norm
    hidden_states.<layer>.attention   optional, float [B, T, D]: states in that layer, after attention and before the FFN
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from rlens_jax.checkpoints.safetensors_file import open_safetensors
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import json_text, new_folder, quoted, read_json_object
from rlens_jax.plans import OPERATORS, PLAN_FIELDS, Operator, Plan, Reduction

FORMAT = "rlens-reference/1"
MANIFEST = "manifest.json"
FIELDS = ("format", "model", "family", "framework", "dtype", "cases")
REDUCTION_FIELDS = ("attention_range", "active_fraction", "probe_fraction", "probe", "window")
CASE_FIELDS = ("file", "plan", *REDUCTION_FIELDS)
CASE_PLAN_FIELDS = tuple(name for name in PLAN_FIELDS if name != "freeze_text_before")
"""That field holds the text of a whole layer, and cases are compared half layer by half layer."""
CONSTANTS = "constants"
LOGITS, POSITIONS, EMBEDDINGS = "logits", "logits_positions", "embeddings"
KEPT = re.compile(r"kept_units\.(0|[1-9]\d*)")
STATES = re.compile(r"hidden_states\.(0|[1-9]\d*)(\.attention)?")
RESULT_NAMES = (LOGITS, POSITIONS, EMBEDDINGS, "kept_units.<layer>", "hidden_states.<layer>", "hidden_states.<layer>.attention")


@dataclass(frozen=True)
class Case:
    """An entry of the manifest: a file, and the plan that was computed."""

    file: str
    plan: Plan
    reduction: Reduction
    further: Mapping[str, Any]
    """Fields that are not part of the format."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    folder: Path
    model: str
    family: str
    framework: Mapping[str, Any]
    dtype: str
    cases: tuple[Case, ...]
    constants: Mapping[str, Any]
    further: Mapping[str, Any]
    """Fields that are not part of the format."""


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a bundle.

    Raises:
        UserError: the folder is missing, it has another format, or a field is missing or not usable.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a bundle is a folder with {MANIFEST}")
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{path}: no such file; a bundle is a folder with {MANIFEST}")
    fields = read_json_object(path)
    where = str(path)
    if "format" in fields and fields["format"] != FORMAT:
        raise UserError(f"{where}: has the format {fields['format']!r}, this version reads {FORMAT!r}")
    _require(fields, FIELDS, where)
    for name, kind in (("model", str), ("family", str), ("framework", dict), ("dtype", str), ("cases", list)):
        if not isinstance(fields[name], kind):
            raise UserError(f"{where}: {name} must be {_KINDS[kind]}, not {quoted(fields[name])}")
    _require(fields["framework"], ("name", "version"), f"{where}: framework")
    if not fields["cases"]:
        raise UserError(f"{where}: cases is empty; a bundle has at least one")
    constants = fields.get(CONSTANTS, {})
    if not isinstance(constants, dict):
        raise UserError(f"{where}: {CONSTANTS} must be an object, not {quoted(constants)}")
    cases = tuple(_read_case(case, f"{where}: case {number}") for number, case in enumerate(fields["cases"]))
    further = {name: value for name, value in fields.items() if name not in (*FIELDS, CONSTANTS)}
    framework, dtype = fields["framework"], fields["dtype"]
    return Manifest(folder, fields["model"], fields["family"], framework, dtype, cases, constants, further)


_KINDS = {str: "a text", dict: "an object", list: "a list"}


def _require(fields: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in fields:
            near = suggest(name, [field for field in fields if field not in names]).replace("did you mean", "is it")
            raise UserError(f"{where}: the field {name} is missing{near}")


def _read_case(fields: Any, where: str) -> Case:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: must be an object, not {quoted(fields)}")
    _require(fields, CASE_FIELDS, where)
    file = fields["file"]
    if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
        raise UserError(f"{where}: file must be the name of a file in the bundle, not {quoted(file)}")
    where = f"{where} ({file})"
    plan = fields["plan"]
    if not isinstance(plan, dict):
        raise UserError(f"{where}: plan must be an object, not {quoted(plan)}")
    _require(plan, OPERATORS, f"{where}: plan")
    for name in plan:
        if name not in CASE_PLAN_FIELDS:
            raise UserError(f"{where}: plan has no field {name!r}{suggest(name, CASE_PLAN_FIELDS)}")
    try:
        checked = Plan.from_fields(plan)
        reduction = Reduction(**{name: fields[name] for name in REDUCTION_FIELDS})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Case(file, checked, reduction, {name: fields[name] for name in fields if name not in CASE_FIELDS})


class CaseFile:
    """The tensors of a case, read on demand.

    Args:
        path: the safetensors file.
        handle: the opened file.
        inputs: names of the inputs of the model family.

    Raises:
        UserError: an unknown tensor, or no logits.
    """

    def __init__(self, path: Path, handle: Any, inputs: Sequence[str]):
        self.path = path
        self._handle = handle
        self.names = list(handle.keys())
        for name in self.names:
            if name not in (*inputs, LOGITS, POSITIONS, EMBEDDINGS) and not KEPT.fullmatch(name) and not STATES.fullmatch(name):
                near = suggest(name, [*inputs, *RESULT_NAMES])
                raise UserError(f"{path}: the tensor {name} is not known{near}; known are {', '.join([*inputs, *RESULT_NAMES])}")
        if LOGITS not in self.names:
            raise UserError(f"{path}: has no {LOGITS}, so there is nothing to compare")
        self.inputs = {name: self.read(name) for name in self.names if name in inputs}

    def read(self, name: str) -> np.ndarray:
        """Read a tensor: floats as float32, integers as int64."""
        array = self._handle.get_tensor(name)
        return array.astype(np.int64 if array.dtype.kind in "iub" else np.float32)

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, as safetensors names it."""
        return str(self._handle.get_slice(name).get_dtype())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._handle.get_slice(name).get_shape())

    def layers(self, pattern: re.Pattern[str]) -> dict[str, int]:
        """Layers of the tensors that match `KEPT` or `STATES`, by name."""
        matches = {name: pattern.fullmatch(name) for name in self.names}
        return {name: int(match[1]) for name, match in matches.items() if match}


@contextmanager
def open_case(folder: Path, case: Case, inputs: Sequence[str]) -> Iterator[CaseFile]:
    """Open the file of a case. UserError when it is missing, damaged or refused by `CaseFile`."""
    path = folder / case.file
    with open_safetensors(path, MANIFEST) as handle:
        yield CaseFile(path, handle, inputs)


def states_name(layer: int, operator: Operator) -> str:
    """Name of the states after the attention of a layer, or after its FFN, which ends the layer."""
    return f"hidden_states.{layer}" + (".attention" if operator == "attention" else "")


@contextmanager
def new_bundle(
    folder: Path, *, model: str, family: str, framework: Mapping[str, str], dtype: str, constants: Mapping[str, Any] | None = None
) -> Iterator["BundleWriter"]:
    """Yield the writer of a new bundle, which appears whole or not at all. UserError when `folder` cannot be created."""
    with new_folder(folder) as unfinished:
        writer = BundleWriter(unfinished)
        yield writer
        manifest = {
            "format": FORMAT,
            "model": model,
            "family": family,
            "framework": dict(framework),
            "dtype": dtype,
            **({} if constants is None else {CONSTANTS: dict(constants)}),
            "cases": writer.cases,
        }
        (unfinished / MANIFEST).write_text(json_text(manifest), encoding="utf-8")


class BundleWriter:
    """Adds cases to a bundle."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.cases: list[dict[str, Any]] = []

    def add(self, plan: Plan, reduction: Reduction, tensors: Mapping[str, np.ndarray]) -> None:
        """Write the next case."""
        file = f"case_{len(self.cases):02}.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, self._folder / file)
        (self._folder / file).chmod(0o644)  # save_file lets only the owner read it
        self.cases.append({"file": file, "plan": plan.fields(), **asdict(reduction)})
