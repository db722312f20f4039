"""Every mesh of eight simulated devices computes the same as one device."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlens_jax.config import FfnPath
from rlens_jax.engine.generating import Generating
from rlens_jax.engine.inputs import Split
from rlens_jax.engine.model_programs import ROWS
from rlens_jax.engine.programs import Programs
from rlens_jax.models.layers import log_probability
from rlens_jax.models.prompt import FILLER, IGNORE
from rlens_jax.models.pruned import run_prompt
from rlens_jax.plans import OPERATORS, Operator, Plan
from rlens_jax.pruning import FastV, Pruning
from tests.engine.test_sharing import decided, ranked
from tests.engine.toy import LAYERS, toy_programs, toy_split, words

pytestmark = pytest.mark.slow

MESHES: dict[str, tuple[int, int, FfnPath]] = {"8x1": (8, 1, "masked"), "2x4": (8, 4, "auto")}
"""Devices, those that share a copy, and the path of reduced FFNs; one device takes `auto`."""
PLAN = Plan(attention=(1, 3), ffn=(0, 3, 4))


@pytest.fixture(scope="module")
def one() -> Programs:
    return toy_programs()


@pytest.fixture(scope="module")
def expected(one: Programs) -> dict[str, np.ndarray]:
    return log_probabilities(one, toy_split(one), PLAN)


@pytest.fixture(scope="module", params=MESHES.values(), ids=list(MESHES))
def many(request: pytest.FixtureRequest) -> Programs:
    devices, model_shards, ffn_path = request.param
    return toy_programs(devices=devices, model_shards=model_shards, ffn_path=ffn_path)


def log_probabilities(programs: Programs, split: Split, plan: Plan) -> dict[str, np.ndarray]:
    """Per sample: whether it is right, and the mean log-probability of its answer."""
    right, values = np.zeros(len(split.samples), bool), np.full(len(split.samples), np.nan)
    for batch in split.batches:
        states = programs.embed(batch.inputs.text_ids, batch.visual)
        states = programs.layers(states, batch.inputs, plan, 0, LAYERS)
        numbers, is_right, value, scored = map(np.asarray, programs.outcome(states, batch.inputs))
        real = numbers != FILLER
        right[numbers[real]], values[numbers[real]] = is_right[real], value[real]
        assert scored.all()
    assert np.isfinite(values).all()
    return {"right": right, "log_probability": values}


def test_outcomes(many: Programs, expected: dict[str, np.ndarray]) -> None:
    sharded = log_probabilities(many, toy_split(many), PLAN)
    np.testing.assert_allclose(sharded["log_probability"], expected["log_probability"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(sharded["right"], expected["right"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_ranking(one: Programs, many: Programs, operator: Operator, tmp_path: Path) -> None:
    """With shared rows, and with early stopping, which evaluates other batches on each mesh."""
    expected, everything = ranked(one, toy_split(one), tmp_path / "one", operator, "none")
    sharded, all_of_them = ranked(many, toy_split(many), tmp_path / "many", operator, "none")
    assert (sharded, all_of_them) == (expected, everything)
    stopped, _ = ranked(many, toy_split(many), tmp_path / "stopped", operator)
    assert decided(stopped) == decided(expected)
    assert len({round_score.score for round_ in expected.rounds for round_score in round_.scores}) > 2


def test_generation(one: Programs, many: Programs) -> None:
    texts = []
    for programs in (one, many):
        scoring, split = Generating(programs, words), toy_split(programs, with_answers=False)
        generated = {}
        for batch in split.batches:
            numbers, tokens, _ = scoring.start(batch, Plan(), PLAN)
            numbers, tokens = np.asarray(numbers), np.asarray(tokens)
            real = numbers != FILLER
            generated |= dict(zip(numbers[real].tolist(), tokens[real].tolist(), strict=True))
        texts.append(generated)
    assert texts[0] == texts[1]
    assert len(texts[0]) == len(split.samples)


def pruned_log_probabilities(programs: Programs, split: Split, pruning: Pruning) -> dict[int, float]:
    """Per sample of the largest bucket: the sum of log-probabilities over its answer, from a separate program."""

    def run(model, visual, batch):
        key = jax.random.key(0)
        states = run_prompt(model.decoder, visual, batch, PLAN, programs.reduction, key, pruning=pruning)
        answers = jnp.take_along_axis(states.x, batch.answer_slots[:, :, None], axis=1)
        counts = batch.answer_targets != IGNORE
        targets = jnp.where(counts, batch.answer_targets, 0)
        values = log_probability(model.decoder.logits(answers), targets)
        return jnp.where(counts, values, 0.0).sum(axis=1)

    program = programs.program("pruned", run, (ROWS, ROWS), ROWS)
    largest = max((batch.inputs.layout.bucket for batch in split.batches), key=lambda bucket: bucket.slots)
    values: dict[int, float] = {}
    for batch in split.batches:
        if batch.inputs.layout.bucket == largest:
            numbers = np.asarray(batch.inputs.samples)[:, 0]
            rows = zip(numbers.tolist(), np.asarray(program(batch.visual, batch.inputs)).tolist(), strict=True)
            values |= {number: value for number, value in rows if number != FILLER}
    assert len(values) > 1
    return values


@pytest.mark.parametrize("pruning", [FastV(2, 0.4)], ids=lambda p: p.label())
def test_pruning(one: Programs, pruning: Pruning) -> None:
    """Scores are averaged over the heads of all shards; every shard drops the same tokens."""
    expected = pruned_log_probabilities(one, toy_split(one), pruning)
    programs = toy_programs(devices=8, model_shards=4)
    sharded = pruned_log_probabilities(programs, toy_split(programs), pruning)
    # More rows are computed together there, so more samples may be in the largest bucket.
    assert {number: sharded[number] for number in expected} == pytest.approx(expected, abs=1e-4, rel=0)
    plain = pruned_log_probabilities(one, toy_split(one), FastV(2, 0))
    assert max(abs(plain[number] - value) for number, value in expected.items()) > 1e-2


def test_the_vocabulary_is_padded_and_cut(many: Programs) -> None:
    shards = many.mesh.shape["model"]
    tables = [leaf for name, leaf in zip(many.names, many.leaves, strict=True) if name.endswith(("embedding", "head"))]
    assert len(tables) == 2
    for table in tables:
        assert table.shape[0] == -(-13 // shards) * shards
        assert table.addressable_shards[0].data.shape[0] == table.shape[0] // shards
