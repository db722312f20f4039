"""Stand-ins for the harnesses, and for the model that they ask."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rlens_jax.harnesses.backends import Question

MADE_FOR = ("vlmeval", "lmms_eval", "rlens_jax.harnesses.vlmevalkit_model", "rlens_jax.harnesses.lmms_eval")
"""Modules of the harnesses, and those that import them."""


class Recorder:
    """A back end that answers with numbers."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def answer(self, questions: Sequence[Question]) -> list[str]:
        self.asked += questions
        return [f"answer {len(self.asked) - len(questions) + place}" for place in range(len(questions))]


@pytest.fixture(scope="session")
def stand_ins() -> Iterator[None]:
    """Let `import vlmeval` and `import lmms_eval` find the stand-ins; tests of the real ones start processes.

    For all tests of a process: beartype remembers the classes of a module's first import.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "stand_ins")
        yield
    for name in list(sys.modules):
        if any(name == start or name.startswith(f"{start}.") for start in MADE_FOR):
            del sys.modules[name]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
