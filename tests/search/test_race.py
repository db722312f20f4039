import math

import numpy as np
import pytest

from rlens_jax.config import SearchConfig
from rlens_jax.errors import UserError
from rlens_jax.search.objective import PlanScore, comparable, score_outcomes
from rlens_jax.search.race import Difficulty, Race, Turn, most_gain_first, sample_weights
from rlens_jax.search.search import rank_layers
from tests.toy_search import Racing, Table, one_at_a_time

NAN = float("nan")


def share_right(candidate, outcomes):
    best = np.nan_to_num(outcomes, nan=1.0)
    return PlanScore(float(best.mean()), 0.0, {}, bound=bool(np.isnan(outcomes).any()))


def raced(table, *, parts=1, size=2, stopping=True, noise=0.0):
    """The race of the rows of `table` [candidates, samples], and its turns as `candidate part block`."""
    blocks = np.split(np.arange(table.shape[1]), range(size, table.shape[1], size))
    per_part = len(blocks) // parts
    race = Race(len(table), [per_part] * parts, table.shape[1], share_right, stopping=stopping, noise=noise)
    turns = []

    def start(turn):
        turns.append("{} {} {}".format(*turn))
        return turn.candidate, blocks[turn.part * per_part + turn.block]

    race.run(start, lambda work: (work[1], table[work[0], work[1]]))
    return race, turns


WORKED = np.array(
    [
        [1, 1, 1, 0, 1, 1, 0, 1],  # 6 of 8
        [1, 1, 0, 0, 0, 1, 1, 1],  # 5: its bound is 6 after two blocks, 5 after three
        [0, 0, 0, 1, 1, 1, 1, 1],  # 5: its bound is 6 after one block, 5 after two
        [0, 0, 1, 1, 1, 1, 1, 1],  # 6: a tie
    ],
    float,
)


def test_the_leader_runs_in_full_and_two_others_take_turns():
    race, turns = raced(WORKED)
    assert turns[:4] == ["0 0 0", "0 0 1", "0 0 2", "0 0 3"]
    # Two blocks are in progress: 2's third block would start after its second one has ended, which drops it.
    assert turns[4:] == ["1 0 0", "2 0 0", "1 0 1", "2 0 1", "1 0 2", "3 0 0", "3 0 1", "3 0 2", "3 0 3"]
    scores = race.scores()
    assert [score.bound for score in scores] == [False, True, True, False]
    assert [score.score for score in scores] == [6 / 8, 5 / 8, 5 / 8, 6 / 8]
    np.testing.assert_array_equal(race.outcomes[2], [0, 0, 0, 1, NAN, NAN, NAN, NAN])


def test_without_stopping_all_is_evaluated():
    race, turns = raced(WORKED, stopping=False)
    np.testing.assert_array_equal(race.outcomes, WORKED)
    assert len(set(turns)) == 16
    assert not any(score.bound for score in race.scores())


def test_a_candidate_better_than_the_leader_is_the_one_to_beat():
    table = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 1]], float)
    race, turns = raced(table, size=1)
    assert [score.bound for score in race.scores()] == [False, False, True, True]
    # 2 could still tie with the leader when 1 was finished. 3's second block drops it, when its third one is in progress.
    assert [turn for turn in turns if turn[0] in "23"] == ["2 0 0", "2 0 1", "2 0 2", "3 0 0", "3 0 1", "3 0 2"]


def test_a_candidate_within_the_noise_of_the_best_is_not_dropped():
    """6, 5, 5 and 6 of 8 samples are right."""
    assert [score.bound for score in raced(WORKED, noise=0.12)[0].scores()] == [False, True, True, False]
    assert [score.bound for score in raced(WORKED, noise=0.125)[0].scores()] == [False] * 4


def test_a_part_is_finished_for_all_before_the_next_one_begins():
    race, turns = raced(WORKED, parts=2)
    assert turns[:4] == ["0 1 0", "0 1 1", "0 0 0", "0 0 1"]
    assert turns[4:10] == ["1 0 0", "2 0 0", "1 0 1", "3 0 0", "2 0 1", "3 0 1"]
    assert turns[10:] == ["1 1 0", "3 1 0", "3 1 1"]  # 2 was dropped in part 0, 1 in part 1
    assert [score.bound for score in race.scores()] == [False, True, True, False]
    every = np.split(np.arange(8), 4)
    alone = Race(2, [1, 1, 2], 8, share_right, stopping=False)
    assert (alone.next(), alone.next(), alone.next()) == (Turn(0, 0, 0), Turn(1, 0, 0), None)  # part 1 has to wait
    alone.enter(0, every[0], [1, 1])
    assert alone.next() is None
    alone.enter(1, every[0], [1, 1])
    assert alone.next() == Turn(0, 1, 0)


def test_what_cannot_be_entered():
    race = Race(2, [2], 4, share_right)
    with pytest.raises(ValueError, match="not one of candidate 0"):
        race.enter(0, [0], [1.0])
    race.next()
    with pytest.raises(ValueError, match="not one of candidate 1"):
        race.enter(1, [0], [1.0])
    for samples, outcomes in (([0, 1], [1.0, 1.5]), ([0], [NAN])):
        with pytest.raises(ValueError, match="at most 1"):
            race.enter(0, samples, outcomes)
    race.enter(0, [0, 1], [1.0, 0.0])
    race.next()
    with pytest.raises(ValueError, match="of samples without one"):
        race.enter(0, [1, 2], [1.0, 0.0])
    with pytest.raises(ValueError, match="no outcome of some samples"):
        race.enter(0, [2], [1.0])


def test_outcomes_of_which_none_is_the_best():
    """Divergences with their sign turned, at most 0: the bound of what is unknown is 0, and large losses come first."""
    table = np.array([[-1, -1, -2, -1], [0, -1, -5, -1], [-4, -2, 0, 0], [-4, 0, 0, 0]], float)

    def score(candidate, outcomes):
        return PlanScore(float(np.nan_to_num(outcomes, nan=0.0).sum()), 0.0, {}, bound=bool(np.isnan(outcomes).any()))

    race = Race(4, [4], 4, score, best=0.0)
    race.run(lambda turn: turn, lambda turn: ([turn.block], [table[turn.candidate, turn.block]]))
    assert [(each.score, each.bound) for each in race.scores()] == [(-5, False), (-6, True), (-6, True), (-4, False)]
    again = Race(1, [1], 1, score, best=0.0)
    again.next()
    with pytest.raises(ValueError, match="at most 0"):
        again.enter(0, [0], [0.5])
    difficulty = Difficulty(4, best=0.0)
    difficulty.add(race.outcomes)
    np.testing.assert_allclose(difficulty.gains(np.ones(4)), [9 / 4, 4 / 4, 7 / 3, 1 / 2])


def cases():
    """Searches over 200 random tables, with all options."""
    for seed in range(200):
        change = ("relative", "absolute")[seed % 2]
        search = SearchConfig(penalty=(2.0, 1.0, 0.0, 3.5)[seed // 2 % 4], change=change)
        yield Table(seed, 3 + seed % 6, "ffn"), search, seed


def searched(table, search, num_layers, score_round):
    return rank_layers(num_layers, min(search % 3, num_layers - 1), "ffn", score_round)


def test_dropping_candidates_changes_no_ranking():
    """Order, ties and chosen scores of 200 random tables are those of a full evaluation, and some is not evaluated."""
    evaluated = total = ties = 0
    for table, search, seed in cases():
        num_layers, racing = 3 + seed % 6, Racing(table, search, size=1 + seed % 4, parts=1 + seed % 3)

        def score(plan, table=table, search=search):
            outcomes = table.by_dataset(table.outcomes(plan))
            return score_outcomes(outcomes, table.dense, alpha=search.penalty, relative=search.change == "relative")

        full, early = (searched(table, seed, num_layers, score_round) for score_round in (one_at_a_time(score), racing))
        assert (early.order, early.base_score, early.prefix_scores) == (full.order, full.base_score, full.prefix_scores)
        for fast, plain in zip(early.rounds, full.rounds, strict=True):
            assert (fast.chosen, fast.ties, fast.chosen_score, fast.layers) == (
                plain.chosen,
                plain.ties,
                plain.chosen_score,
                plain.layers,
            )
            for ours, true in zip(fast.scores, plain.scores, strict=True):
                assert ours == true if not ours.bound else ours.score >= true.score and ours.loss <= true.loss
                assert not ours.bound or comparable(ours.score) < comparable(fast.chosen_score.score)
            ties += bool(plain.ties)
        evaluated += sum(np.isfinite(values).sum() for values in racing.known.values())
        total += len(racing.known) * table.num_samples
    assert ties > 100
    assert evaluated < 0.9 * total


def test_a_killed_search_goes_on_as_if_it_had_not_been():
    for table, search, seed in list(cases())[::10]:
        num_layers, options = 3 + seed % 6, {"size": 1 + seed % 4, "parts": 1 + seed % 3}
        whole = Racing(table, search, **options)
        expected = searched(table, seed, num_layers, whole)
        known = {}
        for killed_after in (1, 5, 9):
            killed = Racing(table, search, **options)
            killed.known.update(known)
            killed.killed_after = killed_after
            with pytest.raises(KeyboardInterrupt):
                searched(table, seed, num_layers, killed)
            known = killed.known
        resumed = Racing(table, search, **options)
        resumed.known.update(known)
        assert searched(table, seed, num_layers, resumed) == expected
        assert resumed.turns == whole.turns


def test_difficulty_counts_wrong_outcomes_of_what_was_evaluated():
    difficulty = Difficulty(4)
    difficulty.add(np.array([1, 0, 1, 0.5]))
    difficulty.add(np.array([[1, 0, 0, NAN], [NAN, NAN, 1, NAN]]))
    np.testing.assert_allclose(difficulty.gains(np.array([1, 1, 3, 1])), [0, 1, 1, 0.5])
    assert Difficulty(2).gains(np.ones(2)).tolist() == [0, 0]


def test_a_sample_weighs_what_it_changes():
    datasets = {"small": np.array([0, 3]), "large": np.array([1, 2, 4, 5])}
    dense = {"small": 0.5, "large": 0.8}
    weights = sample_weights(datasets, dense, relative=True)
    np.testing.assert_allclose(weights, [1, 0.3125, 0.3125, 1, 0.3125, 0.3125])
    np.testing.assert_allclose(sample_weights(datasets, dense, relative=False), [0.5, 0.25, 0.25, 0.5, 0.25, 0.25])
    outcomes = {name: np.ones(len(members)) for name, members in datasets.items()}
    wrong = {**outcomes, "large": np.array([1, 1, 0, 1])}
    changed = [score_outcomes(each, dense, alpha=1.0).score for each in (outcomes, wrong)]
    assert math.isclose(changed[0] - changed[1], weights[4])


def test_no_change_is_relative_to_a_dense_score_of_zero():
    datasets = {"right": np.array([0]), "wrong": np.array([1])}
    with pytest.raises(UserError, match="dataset wrong: the dense model scores 0"):
        sample_weights(datasets, {"right": 1.0, "wrong": 0.0}, relative=True)
    assert sample_weights(datasets, {"right": 1.0, "wrong": 0.0}, relative=False).tolist() == [1, 1]


def test_rows_go_by_gain_per_cost_then_by_number():
    assert most_gain_first([1, 4, 2, 1, 0], [1, 2, 1, 0.5, 1]) == [1, 2, 3, 0, 4]
