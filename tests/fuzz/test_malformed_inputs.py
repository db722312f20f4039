"""Malformed inputs of every kind, all from one seed: each is refused in one line, or is read as it is.

150 inputs by default. RLENS_FUZZ=2000 makes more, and RLENS_FUZZ=17:18 only number 17; a failing input prints that.
Each input is read in this process by the code that every command uses; no model is compiled.
"""

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.base_inputs import BaseInputs, make_base_inputs
from tests.fuzz.guards import WriteWatch, WrongTreatmentError, outcome
from tests.fuzz.kinds import KINDS, Case, warm_up

SEED = 12
DEFAULT = "150"
PRECIOUS = "must stay"

# Threads of Orbax outlive the reading of a damaged folder.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def numbers() -> range:
    first, _, last = os.environ.get("RLENS_FUZZ", DEFAULT).rpartition(":")
    return range(int(first or 0), int(last))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseInputs:
    return make_base_inputs(tmp_path_factory.mktemp("base"))


def test_malformed_inputs(base: BaseInputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text(PRECIOUS)
    watch, accepted, failures, counts = WriteWatch(), {}, [], Counter()
    warm_up(Case(random.Random(SEED), base, tmp_path, outside, accepted))
    for number in numbers():
        name = list(KINDS)[number % len(KINDS)]
        case = Case(random.Random(f"{SEED}/{number}"), base, tmp_path / "case", outside, accepted)
        case.folder.mkdir()
        start = time.monotonic()
        problem = run_case(case, name, watch)
        counts[name, "failed" if problem else "accepted" if case.refusal is None else "refused"] += 1
        if problem:
            line = f"RLENS_FUZZ={number}:{number + 1} {name}: {case.damage.text}: {problem} ({time.monotonic() - start:.1f} s)"
            failures.append(line)
            with capsys.disabled():
                print(f"\n{line}", flush=True)
        shutil.rmtree(case.folder)
    with capsys.disabled():
        for (name, result), count in sorted(counts.items()):
            print(f"\n{name}: {count} {result}", end="")
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures)


def run_case(case: Case, name: str, watch: WriteWatch) -> str | None:
    """What is wrong with the treatment of an input, None if nothing is."""
    before = snapshot(case.outside)
    problem = None
    with watch.only(case.folder, Path(os.environ["XDG_CACHE_HOME"])):
        try:
            KINDS[name](case)
        except WrongTreatmentError as failure:
            problem = str(failure)
    if watch.found:
        problem = f"wrote outside: {watch.found[:3]}"
    if snapshot(case.outside) != before:
        problem = "changed a folder elsewhere"
    left = [path.name for path in case.folder.rglob("*") if path.name.endswith(".partial")]
    return problem or (f"left {left}" if left else None)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_guards_see_what_they_guard_against(tmp_path: Path) -> None:
    watch = WriteWatch()
    with watch.only(tmp_path / "in"):
        (tmp_path / "elsewhere").write_text("x")
        (tmp_path / "folder").mkdir()
    assert [found.split()[0] for found in watch.found] == ["open", "os.mkdir"]
    with pytest.raises(WrongTreatmentError, match="ZeroDivisionError"):
        outcome(lambda: 1 // 0)
