"""Which plans are on the front, and how a front is written, read and shown."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlens_jax.budget import Budget
from rlens_jax.config import RunConfig
from rlens_jax.errors import UserError
from rlens_jax.files import json_text
from rlens_jax.plan_file import read_plan
from rlens_jax.plans import SKIP, Levels, Plan
from rlens_jax.reporting.front_report import front_rows, front_summary, write_front
from rlens_jax.search.bootstrap import Interval
from rlens_jax.search.confirmation import HeldOutLoss
from rlens_jax.search.front import Front, FrontPoint, PrefillTime, front_fields, read_front, undominated
from rlens_jax.search.joint import Path as SearchPath
from rlens_jax.search.joint import PathPoint, State


def test_a_plan_is_off_the_front_if_another_one_is_faster_and_surely_as_good():
    # Lower bounds of what the row's score is above the column's.
    surely = np.array([[0.0, 0.1, 0.1], [-0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]])
    assert undominated([3.0, 2.0, 1.0], surely) == [True, False, True]
    assert undominated([1.0, 2.0, 3.0], surely) == [True, False, False]
    # Equally fast: neither is faster.
    assert undominated([3.0, 2.0, 2.0], surely) == [True, True, True]
    # The faster one may be worse: the bound is below 0.
    assert undominated([3.0, 2.0, 1.0], surely - 0.01) == [True, True, True]
    # A plan whose time was not measured beats none, and none beats it.
    assert undominated([1.0, None, 3.0], surely) == [True, True, False]


PLAN = Plan.of({3: SKIP}, {2: SKIP, 3: SKIP})


def point(kind, plan, score, loss, seconds, **fields):
    time = None if seconds is None else PrefillTime((4.0, 5.0, 4.0), (seconds,) * 3, 8, 4, 2, 16, 64)
    interval = Interval(*(np.array(score + spread) for spread in (0.0, -0.02, 0.02)))
    return FrontPoint(kind, plan, None, 0.5, 64.0, interval, HeldOutLoss(loss, loss + 0.01), None, time, **fields)


def front():
    points = (
        point("dense", Plan(), 0.9, 0.0, 4.0),
        point("joint", PLAN, 0.89, 0.01, 3.0),
        point("random", Plan((0, 1), ()), 0.5, 0.4, None, on_front=False),
        replace(point("down-sampled", Plan(), 0.7, 0.2, 2.0), visual_tokens=31.6),
    )
    path = SearchPath((PathPoint(State((0,) * 4, (0,) * 4), 1.0, 0.0),), ())
    facts = ("flops", Levels(), 4, path, points, 1, "it was the last one", {"a": 8}, 3, "m", "d", "cpu")
    return Front(Budget("loss", 0.02), *facts, RunConfig().portable())


def test_all_of_a_front_is_written_and_read_again(tmp_path):
    write_front(front(), tmp_path)
    fields = read_front(tmp_path / "front.json")
    assert fields == front_fields(front())
    assert [each["visual_tokens"] for each in fields["points"]] == [64.0, 64.0, 64.0, 31.6]
    assert read_plan(tmp_path / "plan.json").plan == PLAN
    page = (tmp_path / "report.html").read_text()
    assert "joint search (published)" in page and "images of 32 visual tokens" in page and page.count("not measured") == 1
    assert all((tmp_path / name).stat().st_size > 100 for name in ("front.png", "front.svg"))
    (tmp_path / "front.json").write_text(json_text(fields | {"published": 4}))
    with pytest.raises(UserError, match="published: names no point"):
        read_front(tmp_path / "front.json")


def test_the_table_says_what_each_plan_saves():
    rows = front_rows(front_fields(front()))
    assert [row.published for row in rows] == [False, True, False, False]
    assert [row.time_saved for row in rows] == [0.0, 0.25, None, 0.5]
    assert [row.layers for row in rows] == ["dense", PLAN.label(), "attention 0-1", "images of 32 visual tokens"]
    lines = front_summary(front(), Path("x")).splitlines()
    (published,) = [line for line in lines if line.startswith("* ")]
    assert published.split() == ["*", "joint", "search", "1.0", "%", "2.0", "%", "50.0", "%", "-", "25.0", "%"]
    assert any(
        line.split() == ["images", "of", "32", "visual", "tokens", "20.0", "%", "21.0", "%", "50.0", "%", "-", "50.0", "%"]
        for line in lines
    )
