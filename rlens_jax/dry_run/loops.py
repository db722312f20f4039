"""How often the loops of a compiled program run. XLA's own cost analysis counts every loop's body once.

A scan's count is in the text: CPUs print it (`known_trip_count`), for a TPU it is read off what the loop's counter begins with
and is compared with. What only the data know comes from whoever built the program: how many layers the loop over layers runs,
and how many decoding steps the loop around it.
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


def known_trips(module: Module) -> dict[str, int | None]:
    """The trip count of every `while` by its name; None where only the data know it."""
    return {
        item.name: _trips(item, computation, module.computations[item.called["condition"]])
        for computation in module.computations.values()
        for item in computation
        if item.opcode == "while"
    }


def _trips(loop: Instruction, around: Computation, condition: Computation) -> int | None:
    found = _KNOWN.search(loop.attributes)
    if found:
        return int(found[1])
    given = around.instructions[loop.operands[0]]
    if given.opcode != "tuple":
        return None

    def at_first(item: Instruction, computation: Computation) -> int | None:
        """The value of a number before the loop, if it is a constant."""
        while item.opcode == "copy":
            item = computation.instructions[item.operands[0]]
        if item.opcode == "constant" and item.arguments.isdigit():
            return int(item.arguments)
        if item.opcode == "get-tuple-element" and computation is condition:
            return at_first(around.instructions[given.operands[int(item.attribute("index") or 0)]], around)
        return None

    end = condition.root
    if end.opcode != "compare" or end.attribute("direction") != "LT":
        return None
    first, last = (at_first(condition.instructions[name], condition) for name in end.operands)
    return None if first is None or last is None else last - first


class Loops:
    """Trip counts of a module's loops, and which of them is the loop over layers.

    That is the outermost one whose known count is the number of layers; if there is none, an outermost loop of unknown count. Of
    several decoding steps, the loop of unknown count around it makes the steps; without them nothing is around the layers, and
    loops of any known count may be in them. One of unknown count inside a layer (tiles that overflow) is counted once: such loops
    are there for the rare case (our assumption).
    """

    def __init__(self, module: Module, counts: LoopCounts):
        self._module = module
        self._counts = counts
        self.known = known_trips(module)

    def is_layer_loop(self, loop: Instruction, inside_layer: bool) -> bool:
        """Whether a `while` is the loop over layers; one inside that is not."""
        if inside_layer:
            return False
        known = self.known[loop.name]
        if known is not None:
            return known == self._counts.layers
        body = self._module.computations[loop.called["body"]]
        return self._counts.steps == 1 or not self._contains_layers(body)

    def trips(self, loop: Instruction, inside_layer: bool) -> int:
        """How often the body of a `while` runs, each time the loop is reached."""
        known = self.known[loop.name]
        if known is not None:
            return known
        if inside_layer:
            return 1
        return self._counts.layers if self.is_layer_loop(loop, inside_layer) else self._counts.steps

    def _contains_layers(self, computation: Computation) -> bool:
        for item in computation:
            if item.opcode == "while" and self.known[item.name] == self._counts.layers:
                return True
            below = [*item.called.values(), *item.branches] if item.opcode in ("while", "conditional", "call") else []
            if any(self._contains_layers(self._module.computations[name]) for name in below):
                return True
        return False
