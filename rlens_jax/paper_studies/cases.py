"""What a study measures: plans, each under a treatment of the tokens."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from rlens_jax.plan import Plan, Reduction
from rlens_jax.pruning import Pruning

Tokens = Literal["visual", "text"]


@dataclass(frozen=True)
class Variant:
    """How the reduced layers of a plan treat tokens; each variant is a compiled program of its own.

    Attributes:
      reduction: range, fractions and probes.
      tokens: which tokens are reduced. "text" is the simulated control (`rlens_jax.paper_studies.text_control`).
      pruning: how visual tokens are dropped besides; None keeps all.
    """

    reduction: Reduction
    tokens: Tokens = "visual"
    pruning: Pruning | None = None

    def key(self) -> str:
        """A text that no other variant has, as the journal names it."""
        pruning = None if self.pruning is None else self.pruning.label()
        return json.dumps({**asdict(self), "pruning": pruning}, sort_keys=True)


@dataclass(frozen=True)
class Case:
    """A plan under a variant; what a study has the outcomes of."""

    plan: Plan
    variant: Variant


def chained(cases: list[Case]) -> list[tuple[Plan, Case]]:
    """Each case with the plan whose stored states it starts from: the one before, or dense if that is nearer.

    The nearer plan is the one that agrees on more of the first layers. All cases are of one variant.
    """
    bases = []
    before = Plan()
    for case in cases:
        # None, for equal plans, is nearest of all.
        near, dense = (plan.lowest_difference(case.plan) for plan in (before, Plan()))
        bases.append((before if near is None or (dense is not None and near > dense) else Plan(), case))
        before = case.plan
    return bases
