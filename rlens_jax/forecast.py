"""The time left of a whole command: the work of all its phases, at the rates measured so far."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RACED_SHARE = 0.42
"""Share of its work that a raced item takes until one was measured, and in a dry run: from replays of finished searches of the
embedded model in blocks of 16 samples."""


@dataclass(frozen=True)
class Work:
    """The work of a phase, item by item, in a unit that all phases of a command share, such as layers times samples.

    Attributes:
        full: items that take all of their work. They come first.
        raced: items that early stopping shortens, by a share that is learnt.
    """

    full: Sequence[float]
    raced: Sequence[float] = ()


class Forecast:
    """Counts finished items of the phases of a command, and tells the seconds left.

    Full and raced items have one rate each, in seconds per unit of work. The first items of a rate count only until others are
    measured: they include compilation.
    """

    def __init__(self, phases: Mapping[str, Work]):
        self._left = {
            name: [(raced, work) for raced, items in enumerate((work.full, work.raced)) for work in items]
            for name, work in phases.items()
        }
        self._measured: tuple[list[tuple[float, float]], ...] = ([], [])
        """Seconds and work of finished items, full and raced."""
        self._now = 0.0

    def begin(self) -> None:
        """Start the clock of the next items."""
        self._now = time.monotonic()

    def end(self, phase: str) -> None:
        """Expect nothing more of a phase."""
        self._left[phase] = []

    def advance(self, phase: str, items: int, *, resumed: bool) -> None:
        """Take the next items of a phase as done; `resumed` ones took no time and count for no rate."""
        before, self._now = self._now, time.monotonic()
        done, self._left[phase] = self._left[phase][:items], self._left[phase][items:]
        total = sum(work for _, work in done)
        if resumed or not total:
            return
        for raced, measured in enumerate(self._measured):
            work = sum(work for kind, work in done if kind == raced)
            if work:
                measured.append((work / total * (self._now - before), work))

    def seconds(self, phase: str) -> tuple[float, float] | None:
        """Seconds left of a phase and of the whole command, None before anything was measured."""
        full, raced = (self._rate(measured) for measured in self._measured)
        if full is None and raced is None:
            return None
        if full is None:
            assert raced is not None
            full = raced / RACED_SHARE
        rates = full, raced if raced is not None else full * RACED_SHARE
        of_phase = {name: sum(rates[raced] * work for raced, work in left) for name, left in self._left.items()}
        return of_phase[phase], sum(of_phase.values())

    @staticmethod
    def _rate(measured: Sequence[tuple[float, float]]) -> float | None:
        counted = measured[1:] or measured
        return sum(seconds for seconds, _ in counted) / sum(work for _, work in counted) if counted else None
