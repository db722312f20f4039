"""The contract of a model family: what its tests must show, whatever the family.

A family declares a tiny model in PyTorch with the same weights, batches of examples and named mutations in a subclass of each
contract. docs/adding_a_family.md lists what is checked.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.leaves import shapes_of
from rlens_jax.families.registry import read_kind
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.plans import Plan, Reduction
from tests.families.branches import BranchContract
from tests.families.operator_settings import OperatorSettingsContract
from tests.families.placement import Placement
from tests.families.published import FACTS
from tests.numerics import assert_close, error
from tests.torch_reductions import reduced

SIMPLE, WHOLE = 1e-5, 1e-4
"""Tolerances of one part, and of a whole model."""
DENSE, PAPER = Plan(), Reduction()
BOTH = Plan(attention=(0, 2, 3), ffn=(1, 2, 4))

Logits = list[np.ndarray]
Mutation = Callable[[VisionLanguageModel], None]


def set_to(parameter: Any, value: float) -> None:
    """Lose a parameter: all its numbers become `value`."""
    parameter[...] = jnp.full_like(parameter[...], value)


def swap(first: Any, second: Any) -> None:
    """Exchange two parameters."""
    first[...], second[...] = second[...], first[...]


class ForwardContract(BranchContract, OperatorSettingsContract):
    """Logits equal those of PyTorch, dense and reduced, and a wrong model misses them. The fixture `pair` is the family's."""

    batches: ClassVar[Collection[str]]
    """Names of batches of examples."""
    reduced: ClassVar[Sequence[tuple[str, Plan]]] = ()
    """Batches and plans of reduced passes."""
    reduction: ClassVar[Reduction] = Reduction(attention_range=5, active_fraction=0.3)
    mutations: ClassVar[Mapping[str, Mutation]]
    """Changes of parameters by name."""
    mutated: ClassVar[str]
    """The batch of one example that shows mutations."""

    @abstractmethod
    def examples(self, pair: Any, batch: str) -> Sequence[Any]:
        """The examples of a batch."""

    @abstractmethod
    def ours(self, model: VisionLanguageModel, pair: Any, examples: Sequence[Any], plan: Plan, reduction: Reduction) -> Logits:
        """Our logits of all tokens of each example, from one padded batch."""

    @abstractmethod
    def theirs(self, pair: Any, examples: Sequence[Any]) -> Logits:
        """The same from PyTorch."""

    def masks(self, examples: Sequence[Any]) -> list[np.ndarray]:
        """The visual tokens of each example, bool [T_i]."""
        return [example.is_visual for example in examples]

    def torch_model(self, pair: Any) -> Any:
        """The PyTorch model, as `reduced` finds its layers."""
        return pair.theirs

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name, values in (("batch", self.batches), ("mutation", self.mutations), ("setting", self.settings)):
            if name in metafunc.fixturenames and "plan" not in metafunc.fixturenames:
                metafunc.parametrize(name, list(values))
        if "plan" in metafunc.fixturenames:
            ids = [f"{batch}-{plan.label()}" for batch, plan in self.reduced]
            metafunc.parametrize(("batch", "plan"), self.reduced, ids=ids)

    def test_logits(self, pair: Any, batch: str) -> None:
        examples = self.examples(pair, batch)
        theirs = self.theirs(pair, examples)
        assert min(float(np.std(row)) for row in theirs) >= 1
        for row, expected in zip(self.ours(pair.ours, pair, examples, DENSE, PAPER), theirs, strict=True):
            assert_close(row, expected, WHOLE)

    def theirs_reduced(self, pair: Any, examples: Sequence[Any], plan: Plan) -> Logits:
        """`theirs` with the layers of `plan` reduced in PyTorch."""
        masks, reduction = [torch.tensor(mask) for mask in self.masks(examples)], self.reduction
        fractions = str(reduction.active_fraction), str(reduction.probe_fraction)
        model, reach = self.torch_model(pair), reduction.attention_range
        with reduced(model, masks, plan.attention, plan.ffn, reach, *fractions) as record:
            theirs = self.theirs(pair, examples)
        assert record.smallest_gap() > 1e-4, "the example decides nothing: choose another seed"
        return theirs

    def test_reduced_logits(self, pair: Any, batch: str, plan: Plan) -> None:
        examples, reach = self.examples(pair, batch), self.reduction.attention_range
        masks, theirs = self.masks(examples), self.theirs_reduced(pair, examples, plan)
        for row, expected in zip(self.ours(pair.ours, pair, examples, plan, self.reduction), theirs, strict=True):
            assert_close(row, expected, WHOLE)
        assert max(mask.sum() for mask in masks) > reach
        for row, dense, mask in zip(theirs, self.theirs(pair, examples), masks, strict=True):
            if mask.sum() > reach:
                assert error(row, dense) > 100 * WHOLE
            if not mask.any():
                assert_close(row, dense, SIMPLE)

    def test_a_mutated_model_misses_by_a_hundred_tolerances(self, pair: Any, mutation: str) -> None:
        examples, model = self.examples(pair, self.mutated), nnx.clone(pair.ours)
        self.mutations[mutation](model)
        (ours,), (theirs,) = self.ours(model, pair, examples, DENSE, PAPER), self.theirs(pair, examples)
        assert error(ours, theirs) > 100 * WHOLE


@dataclass(frozen=True)
class PublishedFacts:
    """A published checkpoint.

    Attributes:
        fields: its config.json.
        shapes: names and shapes of its tensors, by rule.
        numbers: how many numbers they hold.
        folder: of the recorded facts, where the work place has them.
        unused: tensors that no visual token or logit depends on.
        whole: whether `fields` has all that the published config.json says of the model.
    """

    fields: Mapping[str, Any]
    shapes: Mapping[str, list[int]]
    numbers: int
    folder: str
    unused: Collection[str] = ()
    whole: bool = True


class WeightsContract(ABC):
    """Published names map completely, and every parameter is where it belongs.

    The fixtures `reference` and `published` are the family's PyTorch model and the folder that it was saved to.
    """

    facts: ClassVar[Mapping[str, PublishedFacts]]

    @abstractmethod
    def place(self, placed: Placement, reference: Any) -> None:
        """Compare each of our parameters with PyTorch's, by reshapes written out."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "checkpoint" in metafunc.fixturenames:
            metafunc.parametrize("checkpoint", list(self.facts))

    def test_published_names_map_completely(self, checkpoint: str) -> None:
        facts = self.facts[checkpoint]
        kind = read_kind(facts.fields, "config.json")
        table, ours = kind.table(), shapes_of(kind.abstract(jnp.bfloat16))
        table.check_covers(ours)
        mapped = {name: list(tensor.shape) for name, tensor in table.tensors.items()}
        assert mapped == {name: shape for name, shape in facts.shapes.items() if name not in facts.unused}
        assert all(any(re.fullmatch(known.source, name) for known in table.ignored) for name in facts.unused)
        numbers = {name: int(np.prod(shape)) for name, shape in facts.shapes.items()}
        assert sum(numbers.values()) == facts.numbers
        unused = sum(numbers[name] for name in facts.unused)
        assert sum(int(np.prod(shape)) for shape in ours.values()) == facts.numbers - unused
        recorded = FACTS / facts.folder
        if (recorded / "tensor_shapes.json").exists():
            assert facts.shapes == json.loads((recorded / "tensor_shapes.json").read_text())["shapes"]
        if facts.whole and (recorded / "config.json").exists():
            fields = json.loads((recorded / "config.json").read_text())
            assert read_kind(fields, "config.json").config == kind.config

    def test_every_parameter_is_where_it_belongs(self, reference: Any, published: Path) -> None:
        placed = Placement(load_model(published, jnp.float32)[1])
        self.place(placed, reference)
        placed.assert_complete()
