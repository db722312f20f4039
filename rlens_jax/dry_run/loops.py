"""How often the loops of a compiled program run. XLA's own cost analysis counts every loop's body once.

A scan's count is in the text (`known_trip_count`). What only the data know comes from whoever built the program: how many
layers the loop over layers runs, and how many decoding steps the loop around it.
"""

import re
from dataclasses import dataclass

from rlens_jax.dry_run.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')


@dataclass(frozen=True)
class LoopCounts:
    """Trip counts of one program that its text may not tell."""

    layers: int
    """Iterations of the loop over layers."""
    steps: int = 1
    """Iterations of a loop with a data-dependent count around the loop over layers."""


def known_trips(loop: Instruction) -> int | None:
    """The trip count of a `while` if the compiler knows it."""
    found = _KNOWN.search(loop.attributes)
    return int(found[1]) if found else None


class Loops:
    """Trip counts of a module's loops, and which of them is the loop over layers.

    That is the outermost one whose known count is the number of layers; if there is none below it, an outermost loop of
    unknown count. A loop of unknown count around it makes decoding steps. One inside it (tiles that overflow) is counted
    once: such loops are there for the rare case (our assumption).
    """

    def __init__(self, module: Module, counts: LoopCounts):
        self._module = module
        self._counts = counts

    def is_layer_loop(self, loop: Instruction, inside_layer: bool) -> bool:
        """Whether a `while` is the loop over layers; one inside that is not."""
        if inside_layer:
            return False
        known = known_trips(loop)
        if known is not None:
            return known == self._counts.layers
        return not self._contains_layers(self._module.computations[loop.called["body"]])

    def trips(self, loop: Instruction, inside_layer: bool) -> int:
        """How often the body of a `while` runs, each time the loop is reached."""
        known = known_trips(loop)
        if known is not None:
            return known
        if inside_layer:
            return 1
        return self._counts.layers if self.is_layer_loop(loop, inside_layer) else self._counts.steps

    def _contains_layers(self, computation: Computation) -> bool:
        for item in computation:
            if item.opcode == "while" and known_trips(item) == self._counts.layers:
                return True
            below = (
                [*item.called.values(), *item.branches]
                if item.opcode in ("while", "conditional", "call")
                else []
            )
            if any(self._contains_layers(self._module.computations[name]) for name in below):
                return True
        return False
