"""The bare way of a ranking run stays short, and no function of the package becomes long."""

import ast
from pathlib import Path

import rlens_jax

PACKAGE = Path(rlens_jax.__file__).parent
SPINE = (
    "commands/rank.py",
    "ranking/__init__.py",
    "ranking/ranking_run.py",
    "ranking/ranker.py",
    "engine/session.py",
    "engine/programs.py",
    "engine/inputs.py",
    "engine/scoring.py",
    "engine/evaluator.py",
    "engine/schedule.py",
    "search/search.py",
    "search/objective.py",
    "search/journal.py",
)
"""The modules that a reader of a ranking run opens, in order; all others are libraries of these."""
MAX_LINES, MAX_FUNCTION = 1500, 70


def test_the_way_of_a_ranking_run_is_short() -> None:
    assert sum(len((PACKAGE / name).read_text().splitlines()) for name in SPINE) <= MAX_LINES


def test_the_ranking_room_has_no_other_module() -> None:
    ranking = {path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "ranking").glob("*.py")}
    assert ranking == {name for name in SPINE if name.startswith("ranking/")}


def test_no_function_is_long() -> None:
    lengths = {
        f"{path.relative_to(PACKAGE)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == {}
