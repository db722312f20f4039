"""The fast evaluation is the plain one: same outcomes, one compilation a program and bucket, nothing done twice."""

from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlens_jax.errors import UserError
from rlens_jax.plan import Plan
from rlens_jax.ranking.evaluator import Evaluator, Outcomes
from rlens_jax.ranking.inputs import Batch, Dataset
from rlens_jax.ranking.journal import Journal
from rlens_jax.ranking.objective import PlanScore, dataset_metric
from rlens_jax.ranking.programs import Programs
from rlens_jax.ranking.scoring import Generating, TeacherForcing, traced_plan
from rlens_jax.ranking.search import Ranking, one_at_a_time, rank_layers
from tests.ranking.toy import LAYERS, toy_datasets, toy_programs, words


@pytest.fixture(scope="module")
def programs() -> Programs:
    return toy_programs()


@pytest.fixture(scope="module")
def datasets(programs: Programs) -> tuple[Dataset, ...]:
    return toy_datasets(programs)


def evaluator(
    programs: Programs, datasets: tuple[Dataset, ...], folder: Path, state_bytes: float = 1e9
) -> tuple[Evaluator, Journal]:
    journal = Journal.open(folder, {"test": "1"})
    scoring = TeacherForcing(programs)
    made = Evaluator(
        scoring, {"validation": datasets}, journal, state_bytes=state_bytes, advance=lambda _: None
    )
    return made, journal


def plain_batch(programs: Programs, batch: Batch, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """All layers from the start, no base, nothing reused."""
    x, _ = programs.layers(batch.embedded, batch.inputs, traced_plan(plan, LAYERS), 0, LAYERS)
    right, log_probability = programs.outcome(x, batch.inputs)
    return np.asarray(right), np.asarray(log_probability)


def plain_outcomes(programs: Programs, datasets: tuple[Dataset, ...], plan: Plan) -> Outcomes:
    outcomes = {}
    for dataset in datasets:
        values = np.zeros(len(dataset.samples))
        for batch in dataset.batches:
            right, _ = plain_batch(programs, batch, plan)
            for row, sample in enumerate(batch.samples):
                values[sample] = max(values[sample], float(right[row]))
        outcomes[dataset.name] = values
    return outcomes


def score(outcomes: Outcomes) -> PlanScore:
    metrics = {name: dataset_metric(values.tolist()) for name, values in outcomes.items()}
    return PlanScore(score=float(sum(metrics.values())), loss=0.0, metrics=metrics)


def plain_ranking(programs: Programs, datasets: tuple[Dataset, ...], operator: str) -> Ranking:
    return rank_layers(
        LAYERS, 1, operator, one_at_a_time(lambda plan: score(plain_outcomes(programs, datasets, plan)))
    )


@pytest.mark.parametrize("state_bytes", [1e9, 1.0])
@pytest.mark.parametrize("operator", ["attention", "ffn"])
def test_fast_search_is_the_plain_search(
    programs: Programs, datasets: tuple[Dataset, ...], tmp_path: Path, operator: str, state_bytes: float
) -> None:
    fast, journal = evaluator(programs, datasets, tmp_path, state_bytes)
    with journal:
        ranking = rank_layers(
            LAYERS,
            1,
            operator,
            lambda base, plans: [score(outcomes) for outcomes in fast.outcomes("validation", base, plans)],
        )
    plain = plain_ranking(programs, datasets, operator)
    assert ranking == plain
    assert len({round_score.score for round_ in plain.rounds for round_score in round_.scores}) > 2


def test_a_suffix_from_stored_states_is_bit_equal(programs: Programs, datasets: tuple[Dataset, ...]) -> None:
    base = Plan(attention=(3,), ffn=(1,))
    for plan in (base.with_layer("ffn", 4), base.with_layer("attention", 0), base):
        for batch in datasets[0].batches:
            x = batch.embedded
            flags = traced_plan(base, LAYERS)
            start = base.lowest_difference(plan) or 0
            for layer in range(start):
                x, _ = programs.layers(x, batch.inputs, flags, layer, layer + 1)
            x, _ = programs.layers(x, batch.inputs, traced_plan(plan, LAYERS), start, LAYERS)
            right, log_probability = programs.outcome(x, batch.inputs)
            expected = plain_batch(programs, batch, plan)
            np.testing.assert_array_equal(right, expected[0])
            np.testing.assert_array_equal(log_probability, expected[1])


def test_one_trace_per_program_and_bucket(
    programs: Programs, datasets: tuple[Dataset, ...], tmp_path: Path
) -> None:
    buckets = {(b.inputs.layout.bucket, b.inputs.answer_slots.shape) for d in datasets for b in d.batches}
    assert len(buckets) > 1
    made, journal = evaluator(programs, datasets, tmp_path)
    with journal:
        made.outcomes("validation", Plan(), [Plan(), Plan((1,)), Plan((), (0, 3)), Plan((2,), (2,))])
    assert programs.traces["layers"] == len(buckets)
    assert programs.traces["outcome"] == len(buckets)
    assert programs.traces["encode"] == 1


def test_the_journal_is_not_evaluated_again(
    programs: Programs, datasets: tuple[Dataset, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [Plan(), Plan((4,)), Plan((), (2,))]
    first, journal = evaluator(programs, datasets, tmp_path)
    with journal:
        before = first.outcomes("validation", Plan(), plans)
    calls: Counter[str] = Counter()
    monkeypatch.setattr(programs, "layers", lambda *_: calls.update(["layers"]))
    second, journal = evaluator(programs, datasets, tmp_path)
    with journal:
        after = second.outcomes("validation", Plan(), plans)
    assert not calls
    for one, other in zip(before, after, strict=True):
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name])


def test_teacher_forcing_tells_what_generation_does(
    programs: Programs, datasets: tuple[Dataset, ...], tmp_path: Path
) -> None:
    forced, journal = evaluator(programs, datasets, tmp_path / "forced")
    bare = toy_datasets(programs, with_answers=False)
    plans = [Plan(), Plan((0, 1, 2, 3, 4)), Plan((), (0, 1, 2, 3, 4)), Plan((2,), (1,))]
    generated = Journal.open(tmp_path / "generated", {"test": "1"})
    with journal, generated:
        generating = Evaluator(
            Generating(programs, words),
            {"validation": bare},
            generated,
            state_bytes=1e9,
            advance=lambda _: None,
        )
        for plan in plans:
            (one,) = forced.outcomes("validation", Plan(), [plan])
            (other,) = generating.outcomes("validation", Plan(), [plan])
            for dataset in datasets:
                # An answer as long as the limit has no room for the stop token that teacher forcing asks for.
                short = [len(s.answers[0].split()) < programs.new_tokens for s in dataset.samples]
                np.testing.assert_array_equal(one[dataset.name][short], other[dataset.name][short])


def test_any_reference_answer_makes_a_sample_right(programs: Programs, tmp_path: Path) -> None:
    from dataclasses import replace

    from rlens_jax.ranking.inputs import build_datasets
    from tests.ranking.toy import SHAPES, ToyPreparer, answered, toy_samples

    samples = answered(toy_samples(), programs)
    short = [s for s in samples if len(s.answers[0].split()) < programs.new_tokens]
    assert short
    wrong = [replace(s, answers=("12 12",)) for s in short]
    both = [replace(s, answers=("12 12", s.answers[0], "3")) for s in short]
    for number, (members, expected) in enumerate([(wrong, 0.0), (both, 1.0)]):
        built = build_datasets(members, ToyPreparer(), programs, SHAPES, True, lambda: None)
        made, journal = evaluator(programs, built, tmp_path / str(number))
        with journal:
            (outcomes,) = made.outcomes("validation", Plan(), [Plan()])
        assert all((values == expected).all() for values in outcomes.values())


def test_probe_scores_that_are_no_numbers_are_an_error(datasets: tuple[Dataset, ...], tmp_path: Path) -> None:
    broken = toy_programs()
    broken._leaves[:] = [jnp.full_like(leaf, jnp.nan) for leaf in broken._leaves]
    made, journal = evaluator(broken, datasets, tmp_path)
    with journal, pytest.raises(UserError, match=r"s\d+: probe scores are not numbers under the plan ffn 2"):
        made.outcomes("validation", Plan(), [Plan((), (2,))])
    assert not (tmp_path / "journal.jsonl").read_text().count("outcomes")
