"""The contract of operator settings: under each of them, our logits are those of a PyTorch user (`rlens_jax.torch_twin`)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from rlens_jax import torch_twin
from rlens_jax.models import forward as forward_pass
from rlens_jax.models.prompt import Prompt
from rlens_jax.plans import SKIP, TEXT, Plan, Reduction
from tests.numerics import assert_close, error

WHOLE = 1e-4
FROZEN = Plan.of({1: SKIP, 2: SKIP}, {1: SKIP, 2: SKIP})
EVERY_LEVEL: Mapping[str, Plan] = {
    "every level": Plan.of({0: TEXT, 1: SKIP, 2: 3, 3: SKIP}, {0: SKIP, 1: 0.5, 3: SKIP}),
    "frozen with the text before": replace(FROZEN, freeze_text_before=True),
}
"""Each level of a layer matters to the logits, so a wrong one shows."""
ONE_LEVEL: Mapping[str, Plan] = {
    "range": Plan.of({0: 3, 2: 3}, {}),
    "text only": Plan.of({0: TEXT, 2: TEXT}, {}),
    "no attention": Plan.of({0: SKIP, 3: SKIP}, {}),
    "fraction": Plan.of({}, {1: 0.5, 3: 0.5}),
    "no ffn": Plan.of({}, {0: SKIP, 3: SKIP}),
    "frozen": FROZEN,
}
"""For one family. Few different levels, so that few programs are compiled."""


def less_one(plan: Plan) -> Iterator[Plan]:
    """The plan without the level of one layer, or without what it does to text."""
    if plan.freeze_text_before:
        yield replace(plan, freeze_text_before=False)
        return
    attention, ffn = plan.reduced("attention"), plan.reduced("ffn")
    for left_out in attention:
        yield Plan.of({layer: level for layer, level in attention.items() if layer != left_out}, ffn)
    for left_out in ffn:
        yield Plan.of(attention, {layer: level for layer, level in ffn.items() if layer != left_out})


class OperatorSettingsContract(ABC):
    """Each sample alone in PyTorch, all of them as one batch here; the units that PyTorch keeps are imposed."""

    reduction: ClassVar[Reduction]
    settings: ClassVar[Mapping[str, Plan]] = EVERY_LEVEL

    @abstractmethod
    def examples(self, pair: Any, batch: str) -> Sequence[Any]:
        """The examples of a batch; `ragged` has one image, then several, then none."""

    @abstractmethod
    def prompt(self, pair: Any, example: Any) -> Prompt:
        """The prompt of an example."""

    @abstractmethod
    def visual(self, pair: Any, examples: Sequence[Any]) -> list[np.ndarray]:
        """Our visual tokens of each example, [P_i, numbers of a visual token]."""

    @abstractmethod
    def theirs(self, pair: Any, examples: Sequence[Any]) -> list[np.ndarray]:
        """PyTorch's logits of each example."""

    def twin(self, pair: Any, example: Any, plan: Plan) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """PyTorch's logits of an example under a plan, and the units [1, U] that each layer keeps."""
        with torch_twin.reduced(pair.theirs, plan, self.reduction) as record:
            (logits,) = self.theirs(pair, [example])
        return logits, {layer: units.numpy().astype(np.int32) for layer, units in record.kept_units.items()}

    def test_operator_settings(self, pair: Any, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
        plan, examples = self.settings[setting], self.examples(pair, "ragged")[:3]
        visual = self.visual(pair, examples)

        def encoded(model: Any, images: Any, num_slots: int) -> Any:
            filled = np.full((len(visual), num_slots, visual[0].shape[1]), 5, np.float32)
            for row, tokens in zip(filled, visual, strict=True):
                row[: len(tokens)] = tokens
            return jnp.asarray(filled)

        monkeypatch.setattr(forward_pass, "encode", encoded)
        theirs, kept = zip(*(self.twin(pair, example, plan) for example in examples), strict=True)
        imposed = {layer: np.concatenate([one[layer] for one in kept]) for layer in kept[0]}
        prompts = [self.prompt(pair, example) for example in examples]
        ours = forward_pass.forward(pair.ours, [[]] * len(prompts), prompts, plan, self.reduction, imposed)
        for row, expected, example, tokens in zip(ours, theirs, examples, visual, strict=True):
            assert_close(row, expected, WHOLE)
            for without in less_one(plan) if len(tokens) else ():
                assert error(expected, self.twin(pair, example, without)[0]) > 100 * WHOLE, without
