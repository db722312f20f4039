"""Bars of the package's structure: few files and lines, short functions, one file per name, a short path of a ranking run."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import rlens_jax

PACKAGE = Path(rlens_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PER_FAMILY = {"model.py", "preparer.py", "weights.py", "reference.py"}
"""Every family folder has these."""
RANKING_RUN = (
    "commands/rank.py",
    "ranking/__init__.py",
    "ranking/ranking_run.py",
    "ranking/ranker.py",
    "engine/session.py",
    "engine/programs.py",
    "engine/inputs.py",
    "engine/scoring.py",
    "engine/evaluator.py",
    "engine/racing.py",
    "engine/schedule.py",
    "search/search.py",
    "search/race.py",
    "search/objective.py",
    "search/journal.py",
)
"""The modules that a reader of a ranking run opens, in order. All others are libraries of these."""
MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES, MAX_RANKING_LINES = 285, 42_187, 70, 1900
"""The first two are what the package has, with little to spare: raise them on purpose, with the feature that needs it."""


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function and method."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_the_package_has_few_files_and_lines() -> None:
    assert len(FILES) <= MAX_FILES
    assert sum(map(num_lines, FILES)) <= MAX_LINES


def test_no_two_files_have_one_name() -> None:
    families = PACKAGE / "families"
    names = Counter(
        path.name
        for path in FILES
        if path.name != "__init__.py" and not (path.name in PER_FAMILY and path.parent.parent == families)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_no_folder_hides_a_command() -> None:
    """`rlens_jax.NAME` is a command (rlens_jax/__init__.py), so no folder or module next to it has that name."""
    commands = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__"}
    assert commands & {path.stem for path in PACKAGE.iterdir()} == set()


def test_no_function_is_long() -> None:
    lengths = dict(item for path in FILES for item in functions(path))
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def test_the_path_of_a_ranking_run_is_short() -> None:
    assert sum(num_lines(PACKAGE / name) for name in RANKING_RUN) <= MAX_RANKING_LINES


def test_the_ranking_folder_has_no_other_module() -> None:
    ranking = {path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "ranking").glob("*.py")}
    assert ranking == {name for name in RANKING_RUN if name.startswith("ranking/")}
