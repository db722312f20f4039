"""Fidelity to the dense model is what a plain computation in float64 says, on any mesh and in rows of any sharing."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlens_jax.config import SearchConfig
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.fidelity import AnswerAgreement, Fidelity, LargestDivergence
from rlens_jax.engine.inputs import Split, build_split
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.racing import RoundScorer
from rlens_jax.errors import UserError
from rlens_jax.models.layers import kl_divergence
from rlens_jax.models.prompt import FILLER, IGNORE
from rlens_jax.ops.attention import MASKED
from rlens_jax.plans import Plan
from rlens_jax.search.journal import Journal
from rlens_jax.search.search import rank_layers
from tests.engine.test_sharing import ENDS, asked
from tests.engine.toy import LAYERS, ToyPreparer, answered, damaged, shapes_of, toy_programs

PLAN = Plan((1, 3), (0, 3, 4))
SHAPES = shapes_of((48,), (12,), 2)
Logits = dict[int, np.ndarray]
"""By sample: the logits at its answer's tokens, float64 [tokens, V]."""


@pytest.fixture(scope="module")
def programs() -> Programs:
    return toy_programs(stop_tokens=ENDS)


@pytest.fixture(scope="module")
def split(programs: Programs) -> Split:
    return split_of(programs)


def split_of(programs: Programs) -> Split:
    """Questions that share rows; each has one answer, of up to three tokens, and its end."""
    samples = []
    for sample in answered(asked(), programs, SHAPES):
        tokens = itertools.takewhile(lambda token: int(token) not in ENDS, sample.answers[0].split())
        samples.append(replace(sample, answers=(" ".join(tokens),)))
    return build_split(samples, ToyPreparer(), programs, SHAPES, True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def naive_kl(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference || logits), in float64."""
    p, q = log_softmax(reference.astype(np.float64)), log_softmax(logits.astype(np.float64))
    return (np.exp(p) * (p - q)).sum(axis=-1)


def logits_of(programs: Programs, split: Split, plan: Plan) -> Logits:
    """All layers from the start, no base, nothing reused."""
    model, found = programs.model(), {}
    for batch in split.batches:
        states, inputs = programs.embed(batch.inputs.text_ids, batch.visual), batch.inputs
        x = programs.layers(states, inputs, plan, 0, LAYERS).x
        logits = np.asarray(model.decoder.logits(jnp.take_along_axis(x, inputs.answer_slots[:, :, None], axis=1)), np.float64)
        for row, branch in zip(*np.nonzero(np.asarray(inputs.samples) != FILLER), strict=True):
            mine = (np.asarray(inputs.answer_branch[row]) == branch) & (np.asarray(inputs.answer_targets[row]) != IGNORE)
            found[int(inputs.samples[row, branch])] = logits[row][mine]
    return found


def targets_of(split: Split) -> dict[int, np.ndarray]:
    """By sample: the tokens of its answer."""
    found = {}
    for batch in split.batches:
        inputs = batch.inputs
        for row, branch in zip(*np.nonzero(np.asarray(inputs.samples) != FILLER), strict=True):
            mine = (np.asarray(inputs.answer_branch[row]) == branch) & (np.asarray(inputs.answer_targets[row]) != IGNORE)
            found[int(inputs.samples[row, branch])] = np.asarray(inputs.answer_targets[row])[mine]
    return found


def outcomes_of(
    programs: Programs, split: Split, plan: Plan, folder: Path, measure: str = "kl", scoring: Fidelity | None = None
) -> np.ndarray:
    """From the states of another base, by the evaluator: float64[samples]."""
    with Journal.open(folder, {}) as journal:
        evaluator = Evaluator(scoring or Fidelity(programs, measure), {"all": split}, journal, state_bytes=1e9)
        evaluator.outcomes("all", Plan((), (4,)), [plan])
        return journal.outcomes("all", plan, len(split.samples))


def test_kl_divergence() -> None:
    """Against float64, with padding in the vocabulary, a token of probability 0, and in the direction that is said."""
    draw = np.random.default_rng(0)
    dense, other = (draw.normal(0, 4, (2, 3, 17)).astype(np.float32) for _ in range(2))
    dense[0, 0, 5] = other[0, 1, 2] = -400.0  # exp is 0 in float32
    padded = [np.pad(logits, ((0, 0), (0, 0), (0, 3)), constant_values=np.float32(MASKED)) for logits in (dense, other)]
    found = np.asarray(kl_divergence(*map(jnp.asarray, padded)))
    np.testing.assert_allclose(found, naive_kl(dense, other), rtol=1e-5)
    assert np.abs(found - naive_kl(other, dense)).min() > 1e-2
    assert found[0, 1] > 50  # the dense model's token has lost its probability
    shifted = np.asarray(kl_divergence(jnp.asarray(dense), jnp.asarray(dense + np.float32(1))))
    np.testing.assert_allclose(shifted, 0.0, atol=1e-6)


def test_outcomes(programs: Programs, split: Split, tmp_path: Path) -> None:
    dense, reduced = (logits_of(programs, split, plan) for plan in (Plan(), PLAN))
    assert len({len(logits) for logits in dense.values()}) > 1
    found = outcomes_of(programs, split, PLAN, tmp_path / "reduced")
    expected = np.array([-naive_kl(dense[number], reduced[number]).mean() for number in range(len(found))])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert expected.max() < -1e-3
    np.testing.assert_allclose(outcomes_of(programs, split, Plan(), tmp_path / "dense"), 0.0, atol=1e-6)
    largest = outcomes_of(programs, split, PLAN, tmp_path / "largest", scoring=LargestDivergence(programs))
    expected = np.array([-naive_kl(dense[number], reduced[number]).max() for number in range(len(found))])
    np.testing.assert_allclose(largest, expected, atol=1e-5)
    agreed = outcomes_of(programs, split, PLAN, tmp_path / "agreed", "agreement")
    shares = [(dense[n].argmax(axis=-1) == reduced[n].argmax(axis=-1)).mean() for n in range(len(agreed))]
    np.testing.assert_allclose(agreed, shares, atol=1e-12)
    assert set(np.round(agreed, 3)) - {0.0, 1.0} and agreed.min() < 1
    answered_alike = outcomes_of(programs, split, PLAN, tmp_path / "answers", scoring=AnswerAgreement(programs))
    shares = [(tokens == reduced[n].argmax(axis=-1)).mean() for n, tokens in sorted(targets_of(split).items())]
    np.testing.assert_allclose(answered_alike, shares, atol=1e-12)


def test_a_one_shot_ranking_by_kl(programs: Programs, split: Split, tmp_path: Path) -> None:
    """And one that drops candidates has the winner of a full evaluation."""
    logits = {plan: logits_of(programs, split, plan) for plan in (Plan(), *(Plan((), (layer,)) for layer in range(LAYERS)))}

    def plain(plan: Plan) -> float:
        values = {n: naive_kl(logits[Plan()][n], logits[plan][n]).mean() for n in range(len(split.samples))}
        return sum(np.mean([values[n] for n in members]) for members in split.datasets.values())

    search = SearchConfig().by("one_shot", "kl")
    with Journal.open(tmp_path, {}) as journal:
        evaluator = Evaluator(Fidelity(programs, "kl"), {"all": split}, journal, state_bytes=1e9)
        dense = dict.fromkeys(split.datasets, 0.0)
        ranking = rank_layers(LAYERS, 0, "ffn", RoundScorer(evaluator, "all", dense, search), method="one_shot")
        (round_,) = ranking.rounds
        raced = SearchConfig(objective="teacher_forced", method="one_shot", one_shot_by="kl", stopping="exact")
        first = rank_layers(LAYERS, 0, "ffn", RoundScorer(evaluator, "all", dense, raced)).rounds[0]
    expected = [plain(Plan((), (layer,))) for layer in range(LAYERS)]
    np.testing.assert_allclose([-score.score for score in round_.scores], expected, atol=1e-5)
    assert ranking.order == tuple(np.argsort(expected))
    assert min(np.diff(sorted(expected))) > 1e-4
    assert (first.chosen, first.ties) == (round_.chosen, round_.ties)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "model_shards"), [(8, 1), (8, 4)])
def test_any_mesh(programs: Programs, split: Split, devices: int, model_shards: int, tmp_path: Path) -> None:
    """The vocabulary of 13 is padded and cut over four devices."""
    many = toy_programs(devices=devices, model_shards=model_shards, stop_tokens=ENDS)
    expected = outcomes_of(programs, split, PLAN, tmp_path / "one")
    np.testing.assert_allclose(outcomes_of(many, split_of(many), PLAN, tmp_path / "many"), expected, atol=1e-4)


@pytest.mark.parametrize("value", [-2e-6, np.nan])
def test_numbers_that_no_divergence_has(
    programs: Programs, split: Split, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = Fidelity(programs, "kl")
    with Journal.open(tmp_path, {}) as journal:
        evaluator = Evaluator(scoring, {"all": split}, journal, state_bytes=1e9)
        if np.isnan(value):
            evaluator.outcomes("all", Plan(), [Plan()])  # the references are made
            with damaged(programs, "decoder.norm.scale", ..., jnp.nan), pytest.raises(UserError, match="infinite or undefined"):
                evaluator.outcomes("all", Plan(), [PLAN])
            return
        finish = changed(scoring.finish, value)
        monkeypatch.setattr(scoring, "finish", finish)
        with pytest.raises(UserError, match=r"s\d+: the divergence from the dense model is -2e-06, which cannot be below 0"):
            evaluator.outcomes("all", Plan(), [PLAN])


def changed(finish: Callable[..., object], value: float) -> Callable[..., object]:
    """All divergences are `value`."""
    return lambda run, samples: finish((*run[:3], np.full_like(np.asarray(run[3]), value), *run[4:]), samples)


def test_rounding_below_zero_is_zero(programs: Programs, split: Split) -> None:
    scoring, batch = Fidelity(programs, "kl"), split.batches[0]
    scoring.hold([batch])
    run = scoring.start(batch, Plan(), PLAN)
    outcomes = changed(scoring.finish, -9e-7)(run, split.samples).outcome
    assert (outcomes == 0).all() and not np.signbit(outcomes).any()
