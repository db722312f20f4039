"""Locate the first difference between our model and the reference in one case, as far as the bundle tells."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlens_jax.parity.measures import relative_to_change
from rlens_jax.parity.operators import Halves, OperatorCheck, OperatorDifference, Precision, Rows, half, toggled
from rlens_jax.parity.reference_case import ReferenceCase
from rlens_jax.plans import OPERATORS, Operator


@dataclass(frozen=True)
class Parting:
    """The first difference between the two models."""

    layer: int | None
    """None if the bundle does not determine it."""
    operator: Operator | None
    text: str


class Locator:
    """Names the first difference of a case; `agreeing` are earlier cases that agree."""

    def __init__(
        self,
        reference: ReferenceCase,
        halves: Halves,
        num_layers: int,
        check: OperatorCheck,
        agreeing: Sequence[ReferenceCase],
        precision: Precision,
    ):
        self._reference, self._halves, self._num_layers = reference, halves, num_layers
        self._check, self._agreeing, self._precision = check, agreeing, precision

    def parting(self, wrong_selections: Sequence[int]) -> Parting:
        """The first difference; `wrong_selections` are the layers whose kept units differ by more than near-ties."""
        wrong = next((difference for difference in self._check.differences if not difference.agrees), None)
        if wrong_selections and (wrong is None or 2 * wrong_selections[0] + 1 < wrong.last):
            return self._of_selection(wrong_selections)
        return self._after_the_states() if wrong is None else self._of_operators(wrong)

    def _of_selection(self, layers: Sequence[int]) -> Parting:
        gap = max(self._check.selections[layer].largest_gap for layer in layers)
        text = (
            f"the probes choose other units in layer {', '.join(map(str, layers))}: exchanged units have scores up to {gap:.1e} "
            f"away from the last one kept (near-ties: {self._precision.near_tie:.0e}); compare probe_fraction, the order of the "
            "probes and the scores"
        )
        return Parting(layers[0], "ffn", text)

    def _of_operators(self, wrong: OperatorDifference) -> Parting:
        by = f"; relative difference {wrong.relative:.1e}, limit {wrong.limit:.0e}"
        if wrong.last < 0:
            return Parting(
                None, None, f"they first differ before layer 0, in the embeddings, the vision tower or the connector{by}"
            )
        if wrong.first == 2 * self._num_layers:
            return Parting(None, None, f"they first differ after the last layer, in the final norm or the head{by}")
        first, (layer, last) = max(wrong.first, 0), half(wrong.last)
        if half(first)[0] != layer:
            layers = f"one of the layers {half(first)[0]} to {layer}"
            return Parting(None, None, f"they first differ in {layers}; the bundle has no hidden_states between{by}")
        operator = last if first == wrong.last else self._blamed(wrong)
        text = f"they first differ in layer {layer}, in "
        text += operator or "attention or ffn (the bundle has no states between the two)"
        if wrong.first < 0:
            text += ", or before it: embeddings, vision tower, connector"
        return Parting(layer, operator, f"{text}{by}")

    def _after_the_states(self) -> Parting:
        if not self._check.differences:
            operator = self._blamed_by_other_cases(None)
            why = "" if operator is None else f" in a layer with reduced {operator}: with that dense, they agree"
            return Parting(None, operator, f"they differ{why}; the bundle has no hidden_states to locate the layer")
        last = self._check.differences[-1].last
        if last == 2 * self._num_layers:
            text = "each operator agrees on the reference's states, but the differences of all of them add up to more"
            return Parting(None, None, text)
        place = "the embeddings" if last < 0 else f"layer {half(last)[0]}'s {half(last)[1]}"
        return Parting(None, None, f"they differ after {place}, the last states in the bundle")

    def _blamed(self, wrong: OperatorDifference) -> Operator | None:
        """The half of a layer that differs, as far as the states before and after the whole layer show it."""
        layer, plan = half(wrong.last)[0], self._reference.case.plan
        before, theirs = self._check.before[wrong.first], self._reference.states(layer, "ffn")
        assert theirs is not None
        both = (2 * layer, 2 * layer + 1)

        def agree(ours: Rows, count: int | None = None) -> bool:
            a, b, x = ([row[:count] for row in rows] for rows in (ours, theirs, before))
            return relative_to_change(a, b, x, self._precision.rounding) <= wrong.limit

        # Does the reference compute in full what the plan reduces, or the other way round?
        for operator in OPERATORS:
            if agree(self._halves.run(before, both, toggled(plan, operator, layer))):
                return operator
        blamed = self._blamed_by_other_cases(layer)
        if blamed is not None or layer in plan.reduced("ffn"):
            return blamed
        # A first token attends to itself alone, and the dense FFN treats each token separately.
        return "attention" if agree(self._halves.run(before, both, plan), 1) else None

    def _blamed_by_other_cases(self, layer: int | None) -> Operator | None:
        """The only operator that is reduced here (in `layer`, or anywhere) and dense in a case that agrees."""
        for other in filter(self._reference.same_tokens, self._agreeing):
            changed: list[Operator] = []
            for operator in OPERATORS:
                ours, theirs = (reference.case.plan.reduced(operator) for reference in (self._reference, other))
                added = set(ours) - set(theirs)
                if added if layer is None else layer in added:
                    changed.append(operator)
            if len(changed) == 1:
                return changed[0]
        return None
