"""Compare our model with the results in a bundle, case by case, and locate the first difference.

Two arrays agree if |a - b| <= tolerance * max(1, max|b|), b the reference; differences are reported relative to max(1, max|b|).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.console import Progress
from rlens_jax.engine.startup import start_jax
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import unpack_rows
from rlens_jax.models.decoder import States
from rlens_jax.models.forward import VisionLanguageModel, forward, pack
from rlens_jax.ops.ffn import Kept
from rlens_jax.parity.bundle import (
    KEPT,
    LOGITS,
    POSITIONS,
    STATES,
    Case,
    CaseFile,
    Manifest,
    open_case,
    read_manifest,
    states_name,
)
from rlens_jax.plan import OPERATORS, Operator, Plan
from rlens_jax.resources import versions

POSITIONS_PER_STEP = 64
"""Positions whose log-probabilities are in memory in float64 at the same time."""


@dataclass(frozen=True)
class LogitsDifference:
    """Differences over all compared positions; None if our logits are not all finite."""

    num_positions: int
    max_absolute: float | None
    max_relative: float | None
    argmax_agreement: float
    """Share of positions with the same argmax."""
    mean_kl: float | None
    """Mean over positions of the Kullback-Leibler divergence from the reference, in nats."""
    max_kl: float | None


@dataclass(frozen=True)
class Overlap:
    """Share of the reference's kept units that our probes choose too, over samples with visual tokens."""

    mean: float
    smallest: float


@dataclass(frozen=True)
class StateDifference:
    """Largest relative difference of the states after the attention or the FFN of a layer."""

    layer: int
    after: Operator
    max_relative: float


@dataclass(frozen=True)
class Parting:
    """The first difference between the two models."""

    layer: int | None
    """None if the bundle does not determine it."""
    operator: Operator | None
    text: str


@dataclass(frozen=True)
class CaseResult:
    """Comparison of one case."""

    case: Case
    logits: LogitsDifference
    overlaps: Mapping[int, Overlap]
    """Per layer whose kept units are in the bundle; our model used those units."""
    states: tuple[StateDifference, ...]
    within_tolerance: bool
    parting: Parting | None
    """For a case out of tolerance."""


@dataclass(frozen=True)
class Validation:
    """Comparison of a model with a bundle."""

    model: str
    dtype: str
    num_layers: int
    manifest: Manifest
    tolerance: float
    results: Sequence[CaseResult]
    versions: Mapping[str, str]

    @property
    def within_tolerance(self) -> bool:
        return all(result.within_tolerance for result in self.results)


def validate(model: str, bundle: Path, dtype: str, tolerance: float) -> Validation:
    """Load a model and compare it with all cases of a bundle, with matrix products in the highest precision.

    All cases are checked before the first one is computed.

    Args:
        model: a model folder, or "embedded".
        bundle: the folder of the bundle.
        dtype: dtype of our weights and of our computation.
        tolerance: relative to max(1, largest reference logit).

    Raises:
        UserError: the model or the bundle is not usable, or they do not fit each other.
    """
    if not 0 < tolerance < float("inf"):
        raise UserError(f"--tolerance must be a positive number, not {tolerance}")
    manifest = read_manifest(bundle)
    start_jax()
    kind, loaded = load_model(model, jnp.dtype(dtype))
    if manifest.family != kind.model_type:
        raise UserError(f"{bundle}: the bundle is for {manifest.family!r}, the model is a {kind.model_type!r}")
    inputs = kind.family.reference.names
    for case in manifest.cases:
        with open_case(bundle, case, inputs) as file:
            _Reference(case, file, kind)
    agreeing: list[_Reference] = []
    results = []
    with Progress("comparing", len(manifest.cases), "cases") as progress:
        for case in manifest.cases:
            with open_case(bundle, case, inputs) as file:
                reference = _Reference(case, file, kind)
                results.append(_Comparison(reference, loaded, tolerance, agreeing).result())
            if results[-1].within_tolerance:
                agreeing.append(reference)
            progress.advance()
    return Validation(model, dtype, kind.config.decoder.num_layers, manifest, tolerance, results, versions())


class _Reference:
    """Inputs and results of a case, checked against the model.

    Attributes:
        case: the entry of the manifest.
        inputs: the prompts and images.
        imposed: int [B, U], the kept units per layer, as far as the file has them.
        positions: per row, the compared positions: those in the file that are not padding.
        logits: float32 [sum of positions, V].
    """

    def __init__(self, case: Case, file: CaseFile, kind: ModelKind):
        self.case, self._file, self._sizes = case, file, kind.config.decoder
        try:
            case.plan.validate(self._sizes.num_layers)
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from None
        self.inputs = kind.family.reference.read(str(file.path), file.inputs, kind.config)
        self._token_ids = file.inputs["input_ids"]
        self.imposed = self._read_kept_units()
        self._check_states()
        self.positions, self.logits = self._read_logits()

    def has_states(self, layer: int, after: Operator) -> bool:
        """Whether the file has the states after the attention or the FFN of a layer."""
        return states_name(layer, after) in self._file.names

    def states(self, layer: int, after: Operator) -> list[np.ndarray]:
        """Those states per row, [T_i, D], without padding."""
        states = self._file.read(states_name(layer, after))
        return [row[: len(inputs.prompt.token_ids)] for row, inputs in zip(states, self.inputs, strict=True)]

    def same_tokens(self, other: "_Reference") -> bool:
        """Whether two cases have the same `input_ids`."""
        return self._token_ids.tobytes() == other._token_ids.tobytes()

    def _shape_error(self, name: str, shape: Sequence[int], expected: str) -> UserError:
        return UserError(f"{self._file.path}: {name} has shape {list(shape)}, expected {expected}")

    def _read_logits(self) -> tuple[list[np.ndarray], np.ndarray]:
        file, (batch, length), vocabulary = self._file, self._token_ids.shape, self._sizes.vocabulary
        if file.dtype(LOGITS) != "F32":
            raise UserError(f"{file.path}: {LOGITS} has dtype {file.dtype(LOGITS)}, expected F32")
        logits, positions = file.read(LOGITS), np.broadcast_to(np.arange(length), (batch, length))
        if POSITIONS in file.names:
            positions = file.read(POSITIONS)
            if positions.ndim != 2 or len(positions) != batch:
                raise self._shape_error(POSITIONS, positions.shape, f"[{batch}, n]")
            if positions.min(initial=0) < 0 or positions.max(initial=0) >= length:
                raise UserError(f"{file.path}: {POSITIONS} has positions outside the sequence of {length} tokens")
        if logits.shape != (*positions.shape, vocabulary):
            expected = [*positions.shape, vocabulary]
            raise self._shape_error(LOGITS, logits.shape, f"{expected} by the model and the inputs")
        kept = [row < len(inputs.prompt.token_ids) for row, inputs in zip(positions, self.inputs, strict=True)]
        compared = np.concatenate([row[keep] for row, keep in zip(logits, kept, strict=True)])
        if not compared.size:
            raise UserError(f"{file.path}: all positions of {LOGITS} are padding")
        if not np.isfinite(compared).all():
            raise UserError(f"{file.path}: {LOGITS} holds NaN or infinite values")
        return [row[keep] for row, keep in zip(positions, kept, strict=True)], compared

    def _read_kept_units(self) -> dict[int, np.ndarray]:
        width, file, case = self._sizes.ffn_width, self._file, self.case
        expected = [len(self._token_ids), case.reduction.kept_units(width)]
        kept = {}
        for name, layer in file.layers(KEPT).items():
            if layer not in case.plan.ffn:
                raise UserError(f"{file.path}: {name} is present, but the plan reduces no FFN in layer {layer}")
            units = file.read(name)
            if list(units.shape) != expected or file.dtype(name)[0] not in "IU":
                raise self._shape_error(name, units.shape, f"integers {expected}")
            for row, inputs in zip(units, self.inputs, strict=True):
                wrong = row.min() < 0 or row.max() >= width or len(np.unique(row)) != len(row)
                if inputs.prompt.num_visual and wrong:
                    raise UserError(f"{file.path}: {name} names a unit twice or one outside 0 ... {width - 1}")
            kept[layer] = np.clip(units, 0, width - 1)
        missing = [layer for layer in case.plan.ffn if layer not in kept]
        if missing and case.reduction.probe == "random":
            raise UserError(f"{file.path}: other frameworks draw other random probes, so kept_units.{missing[0]} is needed")
        return kept

    def _check_states(self) -> None:
        expected = (*self._token_ids.shape, self._sizes.width)
        for name, layer in self._file.layers(STATES).items():
            if layer >= self._sizes.num_layers:
                raise UserError(f"{self._file.path}: {name} is of a layer that the model lacks")
            if self._file.shape(name) != expected:
                raise self._shape_error(name, self._file.shape(name), str(list(expected)))


class _Comparison:
    """Comparison of our model with one case; `agreeing` are earlier cases that are within the tolerance."""

    def __init__(self, reference: _Reference, model: VisionLanguageModel, tolerance: float, agreeing: Sequence[_Reference]):
        self._reference, self._model, self._tolerance, self._agreeing = reference, model, tolerance, agreeing
        self._images = [inputs.images for inputs in reference.inputs]
        self._text = [inputs.prompt for inputs in reference.inputs]
        self._layout = pack(self._text).layout

    def result(self) -> CaseResult:
        reference = self._reference
        overlaps: dict[int, Overlap] = {}
        states: list[StateDifference] = []
        first_wrong: list[np.ndarray] = []

        def observe(layer: int, operator: Operator, x: States, kept: Kept | None) -> None:
            if kept is not None and layer in reference.imposed:
                overlaps[layer] = self._overlap(np.asarray(kept.units), reference.imposed[layer])
            if reference.has_states(layer, operator):
                ours = self._rows(x)
                states.append(StateDifference(layer, operator, _relative(ours, reference.states(layer, operator))))
                if not first_wrong and not self._agrees(states[-1].max_relative):
                    first_wrong.extend(ours)

        logits = self._compare_logits(self._forward(reference.case.plan, observe))
        within = logits.max_relative is not None and self._agrees(logits.max_relative)
        parting = None if within else self._parting(states, first_wrong)
        return CaseResult(reference.case, logits, overlaps, tuple(states), within, parting)

    def _forward(self, plan: Plan, observe: Callable[[int, Operator, States, Kept | None], None]) -> list[np.ndarray]:
        imposed = {layer: units for layer, units in self._reference.imposed.items() if layer in plan.ffn}
        reduction = self._reference.case.reduction
        return forward(self._model, self._images, self._text, plan, reduction, imposed, observe)

    def _agrees(self, relative: float) -> bool:
        return relative <= self._tolerance

    def _rows(self, x: States) -> list[np.ndarray]:
        """States per row in sequence order, without padding, as float32 [T_i, D]."""
        return unpack_rows(np.asarray(x).astype(np.float32), self._layout)

    def _overlap(self, ours: np.ndarray, theirs: np.ndarray) -> Overlap:
        shares = [
            len(np.intersect1d(a, b)) / len(b) for a, b, prompt in zip(ours, theirs, self._text, strict=True) if prompt.num_visual
        ]
        return Overlap(float(np.mean(shares or [1.0])), min(shares, default=1.0))

    def _compare_logits(self, logits: Sequence[np.ndarray]) -> LogitsDifference:
        theirs, positions = self._reference.logits, self._reference.positions
        ours = np.concatenate([row[chosen] for row, chosen in zip(logits, positions, strict=True)])
        agreement = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
        if not np.isfinite(ours).all():
            return LogitsDifference(len(theirs), None, None, agreement, None, None)
        largest = float(np.abs(ours - theirs).max())
        relative = largest / max(1.0, float(np.abs(theirs).max()))
        divergences = np.concatenate(list(_divergences(theirs, ours)))
        mean, most = float(divergences.mean()), float(divergences.max())
        return LogitsDifference(len(theirs), largest, relative, agreement, mean, most)

    def _parting(self, states: Sequence[StateDifference], first_wrong: Sequence[np.ndarray]) -> Parting:
        """The first difference, as far as the compared states show it; `first_wrong` are our first states that disagree."""
        if not states:
            operator = self._blamed_by_other_cases(None)
            why = "" if operator is None else f" in a layer with reduced {operator}: with that dense, they agree;"
            return Parting(None, operator, f"they differ{why} the bundle has no hidden_states to locate the layer")
        first = next((i for i, state in enumerate(states) if not self._agrees(state.max_relative)), None)
        if first is None:
            last = f"layer {states[-1].layer}'s {states[-1].after}"
            return Parting(None, None, f"they differ after {last}, the last states in the bundle")
        state = states[first]
        known = -1 if first == 0 else _half(states[first - 1])
        missing = _half(state) - known
        if missing > 2 or (missing == 2 and state.after == "attention"):
            layers = f"one of the layers {(known + 1) // 2} to {state.layer}"
            return Parting(None, None, f"they first differ in {layers}; the bundle has no hidden_states between")
        operator = state.after if missing == 1 else self._blamed(state.layer, first_wrong)
        text = f"they first differ in layer {state.layer}, in "
        text += operator or "attention or ffn (the bundle has no states between the two)"
        if known < 0:
            text += ", or before it: embeddings, vision tower, connector"
        return Parting(state.layer, operator, f"{text}; relative difference {state.max_relative:.1e}")

    def _blamed(self, layer: int, ours: Sequence[np.ndarray]) -> Operator | None:
        """The half of a layer that differs, as far as the states after the whole layer show it."""
        plan, theirs = self._reference.case.plan, self._reference.states(layer, "ffn")
        # Does the reference compute in full what the plan reduces, or the other way round?
        flipped: dict[Operator, Plan] = {
            "attention": replace(plan, attention=_toggled(plan.attention, layer)),
            "ffn": replace(plan, ffn=_toggled(plan.ffn, layer)),
        }
        for operator, other in flipped.items():
            if self._agrees(_relative(self._states_after(layer, other), theirs)):
                return operator
        blamed = self._blamed_by_other_cases(layer)
        if blamed is not None or layer in plan.ffn:
            return blamed
        # A first token attends to itself alone, and the dense FFN treats each token separately.
        alone = ([row[:1] for row in rows] for rows in (ours, theirs))
        return "attention" if self._agrees(_relative(*alone)) else None

    def _states_after(self, layer: int, plan: Plan) -> list[np.ndarray]:
        """Our states after a layer under another plan."""
        states: list[np.ndarray] = []

        def observe(number: int, operator: Operator, x: States, kept: Kept | None) -> None:
            if (number, operator) == (layer, "ffn"):
                states.extend(self._rows(x))

        self._forward(plan, observe)
        return states

    def _blamed_by_other_cases(self, layer: int | None) -> Operator | None:
        """The only operator that is reduced here (in `layer`, or anywhere) and dense in a case that agrees."""
        for other in filter(self._reference.same_tokens, self._agreeing):
            changed: list[Operator] = []
            for operator in OPERATORS:
                ours, theirs = (reference.case.plan.layers(operator) for reference in (self._reference, other))
                added = set(ours) - set(theirs)
                if added if layer is None else layer in added:
                    changed.append(operator)
            if len(changed) == 1:
                return changed[0]
        return None


def _half(state: StateDifference) -> int:
    """Number of a half layer: attention of layer 0, FFN of layer 0, attention of layer 1, ..."""
    return 2 * state.layer + (state.after == "ffn")


def _toggled(layers: tuple[int, ...], layer: int) -> tuple[int, ...]:
    return tuple(sorted({layer}.symmetric_difference(layers)))


def _relative(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Largest difference relative to max(1, max|theirs|); infinite if ours are not all finite."""
    largest = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    scale = max(1.0, *(float(np.abs(b).max()) for b in theirs))
    return largest / scale if np.isfinite(largest) else float("inf")


def _divergences(theirs: np.ndarray, ours: np.ndarray) -> Iterator[np.ndarray]:
    """Kullback-Leibler divergence of our logits from the reference at each position."""
    for start in range(0, len(theirs), POSITIONS_PER_STEP):
        p, q = (_log_softmax(x[start : start + POSITIONS_PER_STEP].astype(np.float64)) for x in (theirs, ours))
        yield np.maximum(0.0, (np.exp(p) * (p - q)).sum(axis=1))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
