"""Our model's results against those of a bundle, case by case, and where the two first part.

A difference is relative to max(1, largest number of the reference): within tolerance means |a - b| <= tol * max(1, max|b|).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.reference_inputs import input_names, read_rows
from rlens_jax.families.registry import ModelKind
from rlens_jax.parity.bundle import (
    KEPT,
    LOGITS,
    POSITIONS,
    STATES,
    Case,
    CaseFile,
    Manifest,
    open_case,
    states_name,
)
from rlens_jax.parity.stepwise import Forward
from rlens_jax.plan import OPERATORS, Operator, Plan

POSITIONS_AT_ONCE = 64
"""Whose log-probabilities are held in float64 together."""


@dataclass(frozen=True)
class LogitsDifference:
    """Over all compared positions; None where ours are not all numbers."""

    num_positions: int
    max_absolute: float | None
    max_relative: float | None
    argmax_agreement: float
    """Share of positions."""
    mean_kl: float | None
    """Kullback-Leibler divergence of ours from the reference, in nats, mean over positions."""
    max_kl: float | None


@dataclass(frozen=True)
class Overlap:
    """The share of the reference's kept units that our probes choose too, over samples with visual tokens."""

    mean: float
    smallest: float


@dataclass(frozen=True)
class StateDifference:
    """Largest relative difference of the states after a layer's attention, or after its FFN and so the layer."""

    layer: int
    after: Operator
    max_relative: float


@dataclass(frozen=True)
class Parting:
    """Where the two models part first."""

    layer: int | None
    """None when the bundle does not tell."""
    operator: Operator | None
    text: str


@dataclass(frozen=True)
class CaseResult:
    """How a case compares."""

    case: Case
    logits: LogitsDifference
    overlaps: dict[int, Overlap]
    """By layer with a Dynamic FFN whose kept units the bundle has; these were imposed."""
    states: tuple[StateDifference, ...]
    within_tolerance: bool
    parting: Parting | None
    """For a case out of tolerance."""


@dataclass
class _History:
    """What earlier cases showed, by their input tokens."""

    agreeing: list[tuple[bytes, Plan]] = field(default_factory=list)


def compare(
    manifest: Manifest, kind: ModelKind, model: Any, tolerance: float, advance: Callable[[], None]
) -> list[CaseResult]:
    """Runs all cases of a bundle.

    Args:
        manifest: of the bundle.
        kind: what our model is.
        model: our model.
        tolerance: see above.
        advance: called after each case.

    Raises:
        UserError: the bundle does not fit the model, or a case of it is not as it must be.
    """
    if manifest.family != kind.model_type:
        raise UserError(f"{manifest.folder}: is of the family {manifest.family!r}, the model of {kind.model_type!r}")
    inputs = input_names(kind.model_type)
    for case in manifest.cases:  # all that is wrong is told before anything is computed
        with open_case(manifest.folder, case, inputs) as file:
            _Comparison(case, file, kind, model, tolerance, _History())
    history, results = _History(), []
    for case in manifest.cases:
        with open_case(manifest.folder, case, inputs) as file:
            results.append(_Comparison(case, file, kind, model, tolerance, history).run())
        advance()
    return results


class _Comparison:
    """One case."""

    def __init__(self, case: Case, file: CaseFile, kind: ModelKind, model: Any, tolerance: float, history: _History):
        self._case, self._file, self._model = case, file, model
        self._decoder = kind.config.decoder
        self._tolerance, self._history = tolerance, history
        where = str(file.path)
        try:
            case.plan.validate(self._decoder.num_layers)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        self._rows = read_rows(where, file.inputs, kind.model_type, kind.config)
        self._shape = file.inputs["input_ids"].shape
        self._imposed = self._read_kept_units()
        self._check_states()
        self._logits, self._positions = self._read_logits()

    def run(self) -> CaseResult:
        forward = Forward(self._model, self._rows, self._case.reduction)
        stored = self._file.layers(STATES)
        x, states, overlaps = forward.embedded(), [], {}
        for layer in range(self._decoder.num_layers):
            hollow, dynamic = (layer in self._case.plan.layers(operator) for operator in OPERATORS)
            x = forward.attend(x, layer, hollow)
            if states_name(layer, "attention") in stored:
                states.append(self._compare_states(forward, x, layer, "attention"))
            imposed = self._imposed.get(layer)
            x, kept = forward.feed(x, layer, dynamic, imposed)
            if imposed is not None:
                overlaps[layer] = self._overlap(kept, imposed)
            if states_name(layer, "ffn") in stored:
                states.append(self._compare_states(forward, x, layer, "ffn"))
        logits = self._compare_logits(forward.logits(x))
        within = logits.max_relative is not None and logits.max_relative <= self._tolerance
        tokens = self._file.inputs["input_ids"].tobytes()
        parting = None if within else self._parting(forward, states, tokens)
        if within:
            self._history.agreeing.append((tokens, self._case.plan))
        return CaseResult(self._case, logits, overlaps, tuple(states), within, parting)

    # Reading and checking

    def _refuse_shape(self, name: str, shape: Sequence[int], expected: str) -> UserError:
        return UserError(f"{self._file.path}: {name} has shape {list(shape)}, expected {expected}")

    def _read_logits(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The reference's logits [sum n_i, V] at positions that are no padding, and these positions of each row."""
        logits, (batch, length), file = self._file.read(LOGITS), self._shape, self._file
        vocabulary = self._decoder.vocabulary
        if file.dtype(LOGITS) != "F32":
            raise UserError(f"{file.path}: {LOGITS} has dtype {file.dtype(LOGITS)}, expected F32")
        positions = np.broadcast_to(np.arange(length), (batch, length))
        if POSITIONS in file.names:
            positions = file.read(POSITIONS)
            if positions.ndim != 2 or len(positions) != batch:
                raise self._refuse_shape(POSITIONS, positions.shape, f"[{batch}, n]")
            if positions.min(initial=0) < 0 or positions.max(initial=0) >= length:
                raise UserError(f"{file.path}: {POSITIONS} has positions outside the sequence of {length} tokens")
        if logits.shape != (*positions.shape, vocabulary):
            raise self._refuse_shape(
                LOGITS, logits.shape, f"{[*positions.shape, vocabulary]}, as the model and the inputs have it"
            )
        real = [row < len(own.prompt.token_ids) for row, own in zip(positions, self._rows, strict=True)]
        compared = np.concatenate([row[keep] for row, keep in zip(logits, real, strict=True)])
        if not compared.size:
            raise UserError(f"{file.path}: {LOGITS} has no position that is not padding")
        if not np.isfinite(compared).all():
            raise UserError(f"{file.path}: {LOGITS} holds NaN or infinite values")
        return compared, [row[keep] for row, keep in zip(positions, real, strict=True)]

    def _read_kept_units(self) -> dict[int, np.ndarray]:
        width, file, plan = self._decoder.ffn_width, self._file, self._case.plan
        expected = [self._shape[0], self._case.reduction.kept_units(width)]
        kept = {}
        for name, layer in file.layers(KEPT).items():
            if layer not in plan.ffn:
                raise UserError(f"{file.path}: {name} is there, but the plan reduces no FFN in layer {layer}")
            units = file.read(name)
            if list(units.shape) != expected or file.dtype(name)[0] not in "IU":
                raise self._refuse_shape(name, units.shape, f"whole numbers {expected}")
            for row, own in zip(units, self._rows, strict=True):
                if own.prompt.num_visual and (row.min() < 0 or row.max() >= width or len(np.unique(row)) != len(row)):
                    raise UserError(f"{file.path}: {name} names a unit twice or one outside 0 ... {width - 1}")
            kept[layer] = np.clip(units, 0, width - 1)
        missing = [layer for layer in plan.ffn if layer not in kept]
        if missing and self._case.reduction.probe == "random":
            raise UserError(
                f"{file.path}: random probes are drawn differently elsewhere, so kept_units.{missing[0]} is needed"
            )
        return kept

    def _check_states(self) -> None:
        expected = (*self._shape, self._decoder.width)
        for name, layer in self._file.layers(STATES).items():
            if layer >= self._decoder.num_layers:
                raise UserError(f"{self._file.path}: {name} is of a layer that the model lacks")
            if self._file.shape(name) != expected:
                raise self._refuse_shape(name, self._file.shape(name), str(list(expected)))

    # Comparing

    def _overlap(self, ours: np.ndarray, theirs: np.ndarray) -> Overlap:
        shares = [
            len(np.intersect1d(a, b)) / len(b)
            for a, b, row in zip(ours, theirs, self._rows, strict=True)
            if row.prompt.num_visual
        ]
        return Overlap(float(np.mean(shares or [1.0])), min(shares, default=1.0))

    def _reference_states(self, layer: int, after: Operator) -> list[np.ndarray]:
        states = self._file.read(states_name(layer, after))
        return [row[: len(own.prompt.token_ids)] for row, own in zip(states, self._rows, strict=True)]

    def _compare_states(self, forward: Forward, x: Any, layer: int, after: Operator) -> StateDifference:
        ours, theirs = forward.rows(x), self._reference_states(layer, after)
        return StateDifference(layer, after, _relative(ours, theirs))

    def _compare_logits(self, ours: Sequence[np.ndarray]) -> LogitsDifference:
        chosen = np.concatenate([row[positions] for row, positions in zip(ours, self._positions, strict=True)])
        theirs = self._logits
        agreement = float((chosen.argmax(axis=1) == theirs.argmax(axis=1)).mean())
        if not np.isfinite(chosen).all():
            return LogitsDifference(len(theirs), None, None, agreement, None, None)
        largest = float(np.abs(chosen - theirs).max())
        divergences = np.concatenate(list(_divergences(theirs, chosen)))
        return LogitsDifference(
            len(theirs),
            largest,
            largest / max(1.0, float(np.abs(theirs).max())),
            agreement,
            float(divergences.mean()),
            float(divergences.max()),
        )

    # Where they part

    def _parting(self, forward: Forward, states: Sequence[StateDifference], tokens: bytes) -> Parting:
        first = next((i for i, state in enumerate(states) if not state.max_relative <= self._tolerance), None)
        if not states:
            operator = self._blamed_by_other_cases(tokens, None)
            why = "" if operator is None else f" in a layer with reduced {operator}: with that dense, they agree;"
            return Parting(
                None,
                operator,
                f"they part{why} the bundle has no hidden_states that would tell in which layer",
            )
        if first is None:
            last = states[-1]
            return Parting(
                None,
                None,
                f"they part after layer {last.layer}'s {last.after}, the last states that the bundle has",
            )
        state = states[first]
        known = -1 if first == 0 else _half(states[first - 1])
        missing = _half(state) - known
        if missing > 2 or (missing == 2 and state.after == "attention"):
            return Parting(
                None,
                None,
                f"they first part in one of the layers {(known + 1) // 2} to {state.layer}; "
                "the bundle has no hidden_states between",
            )
        operator = state.after if missing == 1 else self._blamed(forward, state.layer, tokens)
        text = f"they first part in layer {state.layer}, in "
        text += operator or "attention or ffn (the bundle has no states between the two)"
        if known < 0:
            text += ", or before it: embeddings, vision tower, connector"
        return Parting(state.layer, operator, f"{text}; relative difference {state.max_relative:.1e}")

    def _blamed(self, forward: Forward, layer: int, tokens: bytes) -> Operator | None:
        """Which half of a layer parts, as far as the states after the whole layer tell."""
        x = self._states_before(forward, layer)
        theirs = self._reference_states(layer, "ffn")
        plan, imposed = self._case.plan, self._imposed.get(layer)
        hollow, dynamic = (layer in plan.layers(operator) for operator in OPERATORS)

        def agrees(hollow: bool, dynamic: bool) -> bool:
            y, _ = forward.feed(forward.attend(x, layer, hollow), layer, dynamic, imposed if dynamic else None)
            return _relative(forward.rows(y), theirs) <= self._tolerance

        # Does the reference compute an operator that the plan reduces in full, or the other way round?
        if agrees(not hollow, dynamic):
            return "attention"
        if agrees(hollow, not dynamic):
            return "ffn"
        blamed = self._blamed_by_other_cases(tokens, layer)
        if blamed is not None or dynamic:
            return blamed
        # A first token attends to itself alone, and each token has its FFN to itself.
        y, _ = forward.feed(forward.attend(x, layer, hollow), layer, dynamic, None)
        alone = [[row[:1] for row in rows] for rows in (forward.rows(y), theirs)]
        return "attention" if _relative(*alone) <= self._tolerance else None

    def _states_before(self, forward: Forward, layer: int) -> Any:
        """Our own states that enter a layer; they agree with the reference's."""
        x = forward.embedded()
        for below in range(layer):
            x = forward.attend(x, below, below in self._case.plan.attention)
            x, _ = forward.feed(x, below, below in self._case.plan.ffn, self._imposed.get(below))
        return x

    def _blamed_by_other_cases(self, tokens: bytes, layer: int | None) -> Operator | None:
        """The only operator that is reduced here (in `layer`, or anywhere) and dense in a case that agrees."""
        for other_tokens, other in self._history.agreeing:
            if other_tokens != tokens:
                continue
            changed: list[Operator] = []
            for operator in OPERATORS:
                added = set(self._case.plan.layers(operator)) - set(other.layers(operator))
                if added if layer is None else layer in added:
                    changed.append(operator)
            if len(changed) == 1:
                return changed[0]
        return None


def _half(state: StateDifference) -> int:
    """Half-layers are numbered through: attention of layer 0, FFN of layer 0, attention of layer 1 ..."""
    return 2 * state.layer + (state.after == "ffn")


def _relative(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Largest difference relative to max(1, largest of the reference); infinite where ours are not numbers."""
    largest = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    scale = max(1.0, *(float(np.abs(b).max()) for b in theirs))
    return largest / scale if np.isfinite(largest) else float("inf")


def _divergences(theirs: np.ndarray, ours: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(theirs), POSITIONS_AT_ONCE):
        p, q = (_log_softmax(x[start : start + POSITIONS_AT_ONCE].astype(np.float64)) for x in (theirs, ours))
        yield np.maximum(0.0, (np.exp(p) * (p - q)).sum(axis=1))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
