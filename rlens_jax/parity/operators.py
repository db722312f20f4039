"""Our model half layer by half layer, each on the states that the reference has before it.

So an error shows in the operator that makes it, and not where it has grown beyond a tolerance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from rlens_jax.layout import pack_rows, unpack_rows
from rlens_jax.models.decoder import Context, Layer, States, add_feature, layer_at
from rlens_jax.models.forward import Stack, VisionLanguageModel, attend, encode, feed, pack
from rlens_jax.ops.ffn import probe_slots
from rlens_jax.parity.measures import relative, relative_to_change
from rlens_jax.parity.reference_case import ReferenceCase
from rlens_jax.parity.selection import Selection, compare_selections
from rlens_jax.plans import FULL, OPERATORS, SKIP, STANDARD, Operator, Plan, Reduction

NOISE = 4
"""Rounding inside an operator may change its result by this multiple of what rounding of its input changes."""
Rows = Sequence[np.ndarray]
"""States of each sample in sequence order, float32 [T_i, D]."""


@dataclass(frozen=True)
class Precision:
    """What two implementations in one precision may differ by."""

    near_tie: float
    """Distance of a score from the last one kept, relative to it (docs/method.md); also the least tolerance of one operator."""
    rounding: float
    """Of the states, relative."""


FLOAT32, BFLOAT16 = Precision(1e-5, 2**-22), Precision(2**-7, 2**-7)


@dataclass(frozen=True)
class OperatorDifference:
    """Difference after some operators, most often one, that started from the reference's states."""

    first: int
    last: int
    """Numbers of the first and last half layer; -1 is all before the first layer."""
    relative: float
    """To what the operators added; after the embeddings, to max(1, largest reference state)."""
    limit: float

    @property
    def agrees(self) -> bool:
        return self.relative <= self.limit


class Halves:
    """The halves of the decoder layers of our model on the inputs of one case."""

    def __init__(self, model: VisionLanguageModel, reference: ReferenceCase):
        prompts = [inputs.prompt for inputs in reference.inputs]
        self._decoder, self._reference, batch = model.decoder, reference, pack(prompts)
        self._layout = batch.layout
        visual = encode(model, [inputs.images for inputs in reference.inputs], batch.layout.bucket.visual)
        self.embedded: Rows = self._rows(model.decoder.embed(batch.text_ids, visual))
        features = model.decoder.features(visual)
        self._context = model.decoder.context(batch.layout, batch.rope_positions, jax.random.key(0), features=features)
        self._stack = nnx.split(model.decoder.layers)

    def run(self, rows: Rows, halves: Sequence[int], plan: Plan) -> Rows:
        """States after consecutive half layers; those after an FFN are without the layer's deepstack feature, as in bundles."""
        x, reduction = self._packed(rows), self._reference.case.reduction
        for layer, operator in map(half, halves):
            if operator == "attention":
                x = add_feature(x, self._context, layer - 1) if layer else x
                x = attend(self._stack, layer, x, self._context, reduction, plan.level("attention", layer))
            else:
                imposed = self._reference.imposed.get(layer) if plan.level("ffn", layer) not in (FULL, SKIP) else None
                x, _ = feed(self._stack, layer, x, self._context, reduction, plan.level("ffn", layer), imposed)
        return self._rows(x)

    def selection(self, layer: int, rows: Rows) -> Selection:
        """Our selection for the states `rows` that enter an FFN, compared with the reference's."""
        context, reduction = self._context, self._reference.case.reduction
        scores = np.asarray(_probe_scores(self._stack, layer, self._packed(rows), context, reduction))
        visual = [row for row, inputs in enumerate(self._reference.inputs) if inputs.prompt.num_visual]
        return compare_selections(scores[visual], self._reference.imposed[layer][visual])

    def logits(self, rows: Rows) -> np.ndarray:
        """Logits [positions, V] at the compared positions, from the states after the last layer."""
        logits = unpack_rows(np.asarray(self._decoder.logits(self._packed(rows))), self._layout)
        return np.concatenate([row[chosen] for row, chosen in zip(logits, self._reference.positions, strict=True)])

    def _packed(self, rows: Rows) -> States:
        return jnp.asarray(pack_rows(rows, self._layout)).astype(self._decoder.embedding.dtype)

    def _rows(self, x: States) -> Rows:
        return unpack_rows(np.asarray(x).astype(np.float32), self._layout)


@dataclass(frozen=True)
class OperatorCheck:
    """The comparison of all operators of one case that the bundle's states separate."""

    differences: tuple[OperatorDifference, ...]
    selections: dict[int, Selection]
    """Per layer whose kept units are in the bundle."""
    before: dict[int, Rows]
    """States before the operators of the first difference out of its limit, by the number of its first half layer."""


def check_operators(
    halves: Halves, reference: ReferenceCase, num_layers: int, tolerance: float, precision: Precision
) -> OperatorCheck:
    """Run all operators of a case, each from the reference's states as far as the bundle has them.

    One operator may differ by a tenth of `tolerance`, the tolerance of a whole model, but not less than `precision` explains, and
    not less than it differs from itself on states that are rounded otherwise: attention with large scores magnifies rounding.
    """
    per_operator = max(tolerance / 10, precision.near_tie)
    differences: list[OperatorDifference] = []
    selections: dict[int, Selection] = {}
    wrong: dict[int, Rows] = {}
    x, first, plan = halves.embedded, -1, reference.case.plan
    start: Rows | None = reference.embeddings()
    if start is not None:
        differences.append(OperatorDifference(-1, -1, relative(x, start), tolerance))
        x, first = start, 0
    before = x
    for number, (layer, operator) in enumerate(product(range(num_layers), OPERATORS)):
        if operator == "ffn" and layer in reference.imposed:
            selections[layer] = halves.selection(layer, x)
        x, theirs = halves.run(x, [number], plan), reference.states(layer, operator)
        if theirs is None:
            continue
        if first < 0:  # the embeddings and the vision tower are among the operators
            difference = OperatorDifference(first, number, relative(x, theirs), tolerance)
        else:
            change = relative_to_change(x, theirs, before, precision.rounding)
            limit = per_operator * (number - first + 1)
            if change > limit:
                again = halves.run(rounded_otherwise(before, precision), range(first, number + 1), plan)
                limit = max(limit, NOISE * relative_to_change(again, x, before, precision.rounding))
            difference = OperatorDifference(first, number, change, limit)
        differences.append(difference)
        if not difference.agrees and not wrong:
            wrong[first] = before
        x, before, first = theirs, theirs, number + 1
    if first == 2 * num_layers:  # the final norm and the head
        logits = relative([halves.logits(x)], [reference.logits])
        differences.append(OperatorDifference(first, first, logits, per_operator))
    return OperatorCheck(tuple(differences), selections, wrong)


def rounded_otherwise(rows: Rows, precision: Precision) -> Rows:
    """States that differ by a few roundings, the same at each call."""
    rng = np.random.default_rng(0)
    return [row * (1 + precision.rounding * rng.uniform(-1, 1, row.shape)).astype(row.dtype) for row in rows]


def half(number: int) -> tuple[int, Operator]:
    """The half layer of a number: attention of layer 0, FFN of layer 0, attention of layer 1, ..."""
    return number // 2, OPERATORS[number % 2]


def toggled(plan: Plan, operator: Operator, layer: int) -> Plan:
    """The plan with one layer reduced that was not, or the other way round."""
    return plan.with_level(operator, layer, FULL if layer in plan.reduced(operator) else STANDARD)


@partial(jax.jit, static_argnames=("reduction",))
def _probe_scores(stack: Stack, layer: Layer, x: States, context: Context, reduction: Reduction) -> Float[Array, "B F"]:
    """Scores of all units of a layer's FFN for the states that enter it."""
    module = nnx.merge(*layer_at(stack, layer))
    slots, is_probe = probe_slots(context.layout, reduction, jax.random.fold_in(context.random_key, layer))
    visual = module.ffn_norm(x)[:, context.layout.bucket.text :]
    probes = jnp.take_along_axis(visual, slots[:, :, None], axis=1)
    return module.ffn.units(context.halved, layer).scores(probes, is_probe, probes.shape[1])
