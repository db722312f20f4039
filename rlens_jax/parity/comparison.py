"""Compare our model with the results in a bundle, case by case, and locate the first difference.

Logits and states agree if |a - b| <= tolerance * max(1, max|b|), b the reference; differences are reported relative to
max(1, max|b|). A case agrees if its logits do, if each operator agrees on the reference's states (see `check_operators`), and if
the probes choose the same FFN units except for near-ties.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.console import Progress
from rlens_jax.engine.startup import start_jax
from rlens_jax.errors import UserError
from rlens_jax.families.registry import family_of
from rlens_jax.layout import unpack_rows
from rlens_jax.models.decoder import States
from rlens_jax.models.forward import VisionLanguageModel, forward, pack
from rlens_jax.ops.ffn import Kept
from rlens_jax.parity.bundle import MANIFEST, Case, Manifest, open_case, read_manifest
from rlens_jax.parity.constants import ConstantDifference, compare_constants
from rlens_jax.parity.measures import LogitsDifference, logits_difference, relative
from rlens_jax.parity.operators import BFLOAT16, FLOAT32, Halves, OperatorCheck, Precision, check_operators
from rlens_jax.parity.parting import Locator, Parting
from rlens_jax.parity.reference_case import ReferenceCase
from rlens_jax.parity.selection import Selection
from rlens_jax.plans import OPERATORS, Operator
from rlens_jax.resources import versions


@dataclass(frozen=True)
class StateDifference:
    """Largest relative differences of the states after the attention or the FFN of a layer."""

    layer: int
    after: Operator
    max_relative: float
    """Of our whole model up to here."""
    operator_relative: float
    """Of what is between the reference's states before and these, see `OperatorDifference`."""


@dataclass(frozen=True)
class CaseResult:
    """Comparison of one case."""

    case: Case
    logits: LogitsDifference
    selections: Mapping[int, Selection]
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
    constants: Sequence[ConstantDifference]
    results: Sequence[CaseResult]
    versions: Mapping[str, str]

    @property
    def within_tolerance(self) -> bool:
        """Whether all cases agree, and all constants that the bundle names."""
        return not self.constants and all(result.within_tolerance for result in self.results)


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
    manifest, folder = read_manifest(bundle), find_model(model)
    start_jax()
    kind, loaded = load_model(folder, jnp.dtype(dtype), verify=True)
    # A family is one family, whatever the layout of its folder.
    if family_of(manifest.family, f"{bundle / MANIFEST}: family") is not kind.family:
        raise UserError(f"{bundle}: the bundle is for {manifest.family!r}, the model is a {kind.model_type!r}")
    constants = compare_constants(kind.config, manifest.constants, str(bundle / MANIFEST))
    inputs = kind.family.reference.names
    for case in manifest.cases:
        with open_case(bundle, case, inputs) as file:
            ReferenceCase(case, file, kind, folder)
    precision = FLOAT32 if dtype == manifest.dtype == "float32" else BFLOAT16
    agreeing: list[ReferenceCase] = []
    results = []
    with Progress("comparing", len(manifest.cases), "cases") as progress:
        for case in manifest.cases:
            with open_case(bundle, case, inputs) as file:
                reference = ReferenceCase(case, file, kind, folder)
                results.append(_compare(reference, loaded, tolerance, precision, agreeing))
            if results[-1].within_tolerance:
                agreeing.append(reference)
            progress.advance()
    num_layers = kind.config.decoder.num_layers
    return Validation(model, dtype, num_layers, manifest, tolerance, constants, results, versions())


def _compare(
    reference: ReferenceCase,
    model: VisionLanguageModel,
    tolerance: float,
    precision: Precision,
    agreeing: Sequence[ReferenceCase],
) -> CaseResult:
    case, num_layers = reference.case, model.decoder.config.num_layers
    logits, accumulated = _whole_model(reference, model)
    halves = Halves(model, reference)
    check = check_operators(halves, reference, num_layers, tolerance, precision)
    # Random probes of another framework are other probes.
    judged = {} if case.reduction.probe == "random" else check.selections
    wrong = [layer for layer, selection in judged.items() if selection.largest_gap > precision.near_tie]
    within = logits.max_relative is not None and logits.max_relative <= tolerance
    within = within and not wrong and all(difference.agrees for difference in check.differences)
    parting = None if within else Locator(reference, halves, num_layers, check, agreeing, precision).parting(wrong)
    return CaseResult(case, logits, check.selections, _states(accumulated, check), within, parting)


def _whole_model(reference: ReferenceCase, model: VisionLanguageModel) -> tuple[LogitsDifference, dict[int, float]]:
    """Differences of the logits, and of the states in the bundle by the number of the half layer."""
    images, prompts = zip(*((inputs.images, inputs.prompt) for inputs in reference.inputs), strict=True)
    layout = pack(prompts).layout
    accumulated: dict[int, float] = {}

    def observe(layer: int, operator: Operator, x: States, kept: Kept | None) -> None:
        theirs = reference.states(layer, operator)
        if theirs is not None:
            ours = unpack_rows(np.asarray(x).astype(np.float32), layout)
            accumulated[2 * layer + OPERATORS.index(operator)] = relative(ours, theirs)

    case = reference.case
    logits = forward(model, images, prompts, case.plan, case.reduction, reference.imposed, observe)
    ours = np.concatenate([row[chosen] for row, chosen in zip(logits, reference.positions, strict=True)])
    return logits_difference(ours, reference.logits), accumulated


def _states(accumulated: Mapping[int, float], check: OperatorCheck) -> tuple[StateDifference, ...]:
    by_operator = {difference.last: difference.relative for difference in check.differences}
    return tuple(
        StateDifference(number // 2, OPERATORS[number % 2], largest, by_operator[number])
        for number, largest in accumulated.items()
    )
