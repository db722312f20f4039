"""The fast evaluation is the plain one: same outcomes, one compilation a program and bucket, nothing done twice."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlens_jax.console import StopRequested
from rlens_jax.engine.evaluator import Evaluator, Outcomes
from rlens_jax.engine.generating import Generating
from rlens_jax.engine.inputs import Split, build_split
from rlens_jax.engine.pools import Batch
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.scoring import Scoring, TeacherForcing
from rlens_jax.errors import UserError
from rlens_jax.models.prompt import FILLER
from rlens_jax.plans import Plan
from rlens_jax.search.journal import Journal
from rlens_jax.search.search import Ranking, rank_layers
from tests.engine.toy import (
    LAYERS,
    SHAPES,
    STOP,
    ToyPreparer,
    answered,
    damaged,
    score,
    toy_programs,
    toy_samples,
    toy_split,
    words,
)
from tests.numerics import assert_close
from tests.toy_search import one_at_a_time


@pytest.fixture(scope="module")
def programs() -> Programs:
    return toy_programs()


@pytest.fixture(scope="module")
def split(programs: Programs) -> Split:
    return toy_split(programs)


def evaluator(
    programs: Programs, split: Split, folder: Path, state_bytes: float = 1e9, scoring: Scoring | None = None
) -> tuple[Evaluator, Journal]:
    journal = Journal.open(folder, {"test": "1"})
    made = Evaluator(scoring or TeacherForcing(programs), {"validation": split}, journal, state_bytes=state_bytes)
    return made, journal


def plain_batch(programs: Programs, batch: Batch, plan: Plan) -> tuple[np.ndarray, ...]:
    """All layers from the start, no base, nothing reused: samples, outcomes and log-probabilities."""
    states = programs.embed(batch.inputs.text_ids, batch.visual)
    states = programs.layers(states, batch.inputs, plan, 0, LAYERS)
    return tuple(np.asarray(part) for part in programs.outcome(states, batch.inputs)[:3])


def plain_outcomes(programs: Programs, split: Split, plan: Plan) -> Outcomes:
    values = np.zeros(len(split.samples))
    for batch in split.batches:
        numbers, right, _ = plain_batch(programs, batch, plan)
        for number, is_right in zip(numbers.flat, right.flat, strict=True):
            if number != FILLER:
                values[number] = max(values[number], float(is_right))
    return {name: values[members] for name, members in split.datasets.items()}


def plain_ranking(programs: Programs, split: Split, operator: str) -> Ranking:
    return rank_layers(LAYERS, 1, operator, one_at_a_time(lambda plan: score(plain_outcomes(programs, split, plan))))


@pytest.mark.parametrize("state_bytes", [1e9, 1.0])
@pytest.mark.parametrize("operator", ["attention", "ffn"])
def test_fast_search_is_the_plain_search(
    programs: Programs, split: Split, tmp_path: Path, operator: str, state_bytes: float
) -> None:
    fast, journal = evaluator(programs, split, tmp_path, state_bytes)
    with journal:
        ranking = rank_layers(
            LAYERS, 1, operator, lambda base, plans: [score(outcomes) for outcomes in fast.outcomes("validation", base, plans)]
        )
    plain = plain_ranking(programs, split, operator)
    assert ranking == plain
    assert len({round_score.score for round_ in plain.rounds for round_score in round_.scores}) > 2


def test_a_suffix_from_stored_states_is_bit_equal(programs: Programs, split: Split) -> None:
    base = Plan(attention=(3,), ffn=(1,))
    for plan in (base.with_layer("ffn", 4), base.with_layer("attention", 0), base):
        for batch in split.batches:
            states = programs.embed(batch.inputs.text_ids, batch.visual)
            start = base.lowest_difference(plan) or 0
            for layer in range(start):
                states = programs.layers(states, batch.inputs, base, layer, layer + 1)
            states = programs.layers(states, batch.inputs, plan, start, LAYERS)
            for part, expected in zip(programs.outcome(states, batch.inputs), plain_batch(programs, batch, plan), strict=False):
                np.testing.assert_array_equal(part, expected)


def test_the_last_layer_is_computed_at_the_answers_alone(programs: Programs, split: Split) -> None:
    before = Plan(ffn=(1,))
    for plan in (before, before.with_layer("attention", LAYERS - 1).with_layer("ffn", LAYERS - 1)):
        for batch in split.batches:
            states = programs.embed(batch.inputs.text_ids, batch.visual)
            states = programs.layers(states, batch.inputs, plan, 0, LAYERS - 1)
            last = programs.last_layer(states, batch.inputs, plan)
            number, right, value, finite = map(np.asarray, programs.outcome(last, batch.inputs))
            for part, expected in zip((number, right), plain_batch(programs, batch, plan), strict=False):
                np.testing.assert_array_equal(part, expected)
            assert_close(value, plain_batch(programs, batch, plan)[2], 1e-5)
            assert finite[number != FILLER].all()


def test_one_trace_per_program_and_bucket(programs: Programs, split: Split, tmp_path: Path) -> None:
    buckets = {(batch.inputs.layout.bucket, batch.inputs.answer_slots.shape) for batch in split.batches}
    assert len(buckets) > 1
    made, journal = evaluator(programs, split, tmp_path)
    with journal:
        made.outcomes("validation", Plan(), [Plan(), Plan((1,)), Plan((), (0, 3)), Plan((2,), (2,))])
    assert programs.traces["layers"] == programs.traces["last layer"] == len(buckets)
    assert programs.traces["outcome"] == len(buckets)
    assert programs.traces["encode"] == 1


def test_the_journal_is_not_evaluated_again(
    programs: Programs, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [Plan(), Plan((4,)), Plan((), (2,))]
    first, journal = evaluator(programs, split, tmp_path)
    with journal:
        before = first.outcomes("validation", Plan(), plans)
    calls: Counter[str] = Counter()
    monkeypatch.setattr(programs, "layers", lambda *_: calls.update(["layers"]))
    second, journal = evaluator(programs, split, tmp_path)
    with journal:
        after = second.outcomes("validation", Plan(), plans)
    assert not calls
    for one, other in zip(before, after, strict=True):
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name])


def test_teacher_forcing_tells_what_generation_does(programs: Programs, split: Split, tmp_path: Path) -> None:
    forced, journal = evaluator(programs, split, tmp_path / "forced")
    bare = toy_split(programs, with_answers=False)
    plans = [Plan(), Plan((0, 1, 2, 3, 4)), Plan((), (0, 1, 2, 3, 4)), Plan((2,), (1,))]
    generating, generated = evaluator(programs, bare, tmp_path / "generated", scoring=Generating(programs, words))
    with journal, generated:
        for plan in plans:
            (one,) = forced.outcomes("validation", Plan(), [plan])
            (other,) = generating.outcomes("validation", Plan(), [plan])
            for name, members in split.datasets.items():
                # An answer as long as the limit has no room for the stop token that teacher forcing asks for.
                lengths = [len(split.samples[i].answers[0].split()) for i in members]
                short = np.array(lengths) < programs.new_tokens
                np.testing.assert_array_equal(one[name][short], other[name][short])


def test_any_reference_answer_makes_a_sample_right(programs: Programs, tmp_path: Path) -> None:
    samples = answered(toy_samples(), programs)
    short = [s for s in samples if len(s.answers[0].split()) < programs.new_tokens]
    assert short
    wrong = [replace(s, answers=("12 12", "12", "12")) for s in short]
    both = [replace(s, answers=("12 12", s.answers[0], "3")) for s in short]
    for number, (members, expected) in enumerate([(wrong, 0.0), (both, 1.0)]):
        built = build_split(members, ToyPreparer(), programs, SHAPES, True)
        made, journal = evaluator(programs, built, tmp_path / str(number))
        with journal:
            (outcomes,) = made.outcomes("validation", Plan(), [Plan()])
        assert all((values == expected).all() for values in outcomes.values())


def test_any_end_token_ends_an_answer(programs: Programs) -> None:
    """In generation, and where teacher forcing expects the tokenizer's."""
    samples = toy_samples()
    (batch, *_) = build_split(samples, ToyPreparer(), programs, SHAPES, False).batches
    numbers, endless, _ = map(np.asarray, programs.generate(programs.put(batch.visual), batch.inputs, Plan()))
    other = int(next(token for token in endless[:, 0, 1] if token != STOP))
    several = toy_programs(stop_tokens=(STOP, other))
    _, tokens, finite = map(np.asarray, several.generate(several.put(batch.visual), batch.inputs, Plan()))
    assert finite.all()
    answers = {}
    for number, row, long in zip(numbers.flat, tokens[:, 0].tolist(), endless[:, 0].tolist(), strict=True):
        stop = next((place for place, token in enumerate(long) if token in (STOP, other)), None)
        if stop is not None:
            assert row[: stop + 1] == long[: stop + 1]
            assert set(row[stop + 1 :]) <= {STOP, other}
            answers[int(number)] = (words(long[:stop]), long[stop])
    rows = [replace(samples[number], answers=(text,)) for number, (text, _) in answers.items() if number != FILLER]
    ends = [end for number, (_, end) in answers.items() if number != FILLER]
    assert other in ends
    for batch in build_split(rows, ToyPreparer(), programs, SHAPES, True).batches:
        for chosen in (programs, several):
            places, right, _ = plain_batch(chosen, batch, Plan())
            for place, is_right in zip(places.flat, right.flat, strict=True):
                assert place == FILLER or is_right == (chosen is several or ends[place] == STOP)


@pytest.mark.parametrize(
    ("parameter", "layer", "value", "place"),
    [
        ("decoder.embedding", ..., jnp.nan, "the embedding"),
        ("decoder.layers.attention.o_proj.kernel", 3, 1e38, "the attention of layer 3"),
        ("decoder.layers.ffn.down_proj.kernel", 2, jnp.inf, "the FFN of layer 2"),
        ("decoder.layers.ffn.down_proj.kernel", 2, 1e30, "the attention of layer 3"),  # its norm squares the states
        ("decoder.norm.scale", ..., jnp.nan, "the last norm or the head"),
    ],
)
def test_numbers_that_are_not_finite_are_an_error(
    programs: Programs, split: Split, tmp_path: Path, parameter, layer, value, place
) -> None:
    made, journal = evaluator(programs, split, tmp_path)
    message = rf"s\d+: numbers are infinite or undefined under the plan ffn 2, first in {place}; check"
    with journal, damaged(programs, parameter, layer, value), pytest.raises(UserError, match=message):
        made.outcomes("validation", Plan(), [Plan((), (2,))])
    assert not (tmp_path / "journal.jsonl").exists()


def test_visual_tokens_that_are_not_finite_are_an_error(programs: Programs, split: Split, tmp_path: Path) -> None:
    broken = replace(split, pools=tuple(replace(p, visual=np.full_like(p.visual, np.nan)) for p in split.pools))
    made, journal = evaluator(programs, broken, tmp_path)
    with journal, pytest.raises(UserError, match="first in the vision tower or the connector"):
        made.outcomes("validation", Plan(), [Plan()])


def test_a_checkpoint_may_end_the_run_after_any_step(programs: Programs, split: Split, tmp_path: Path) -> None:
    """And the run goes on inside the plan."""
    plans = [Plan(), Plan((4,)), Plan((), (2,))]
    whole, journal = evaluator(programs, split, tmp_path / "whole")
    with journal:
        expected = whole.outcomes("validation", Plan(), plans)
    recorded: list[int] = []
    for allowed in (1, 3, 100):
        with Journal.open(tmp_path / "parts", {"test": "1"}) as journal:
            recorded.append(journal.num_outcomes)

            def checkpoint(begun: int = journal.num_outcomes, allowed: int = allowed) -> None:
                if journal.num_outcomes - begun >= allowed:
                    raise StopRequested

            made = Evaluator(TeacherForcing(programs), {"validation": split}, journal, state_bytes=1e9, checkpoint=checkpoint)
            if allowed < 100:
                with pytest.raises(StopRequested):
                    made.outcomes("validation", Plan(), plans)
            else:
                for one, other in zip(made.outcomes("validation", Plan(), plans), expected, strict=True):
                    for name, values in other.items():
                        np.testing.assert_array_equal(one[name], values)
    assert 0 < recorded[1] < recorded[2]
    assert recorded[1] % len(split.samples)
