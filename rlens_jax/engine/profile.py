"""Where the time of a run goes: `profile.json`, and traces of JAX's profiler, written on request.

The parts of a run exclude each other, so they add up to its time. While a profile is taken, each program's result is waited for,
so that its time is its own: the run is then slower, as host and device do not work at the same time.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from rlens_jax.errors import UserError
from rlens_jax.files import check_local, json_text, replace_file

PROFILE = "profile.json"
SCHEMA = "rlens-profile/1"
PARTS = ("compile", "data", "load", "vision", "base states", "candidates", "outcomes", "timing", "host")
"""Compilation of all programs; reading and preparing samples; loading the model; the vision tower; states that candidates start
from; the layers of candidates, and generation; answers from last states; the timed prefills; all else."""
_OF_PROGRAM = {"encode": "vision", "embed": "base states", "outcome": "outcomes", "static prefill": "timing"}
_COMPILING = "/jax/core/compile/"
TRACED = 3
"""Calls of each program that are traced, after the first one, which compiles."""


@dataclass
class _Runs:
    """The compilations of one program for one shape, and its calls."""

    compilations: int = 0
    seconds: float = 0.0
    """Of the compilations."""
    calls: list[float] = field(default_factory=list)
    """Seconds of each, compilation included."""
    flops: set[int | None] = field(default_factory=set)
    """Of the calls; None if they depend on data."""

    def rate(self) -> tuple[int | None, float | None]:
        """The FLOPs of a call, None unless all calls have the same; and, without the first call, the best rate."""
        flops = next(iter(self.flops)) if len(self.flops) == 1 else None
        return flops, flops / min(self.calls[1:]) if flops is not None and len(self.calls) > 1 else None


@dataclass(eq=False)
class Profile:
    """Seconds per part, and the compilations and calls of each program, of a run that is in progress.

    With a folder for `traces`, it gets a trace of some calls of each program: DIR/PROGRAM, for TensorBoard or XProf.
    """

    traces: Path | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    programs: dict[tuple[str, tuple[int, ...]], _Runs] = field(default_factory=lambda: defaultdict(_Runs))
    _within: list[str] = field(default_factory=lambda: ["host"])
    _since: float = field(default_factory=time.perf_counter)
    _thread: int = field(default_factory=threading.get_ident)
    _program: tuple[str, tuple[int, ...]] | None = None
    _events: list[tuple[float, float]] = field(default_factory=list)
    """Begin and seconds of the compilations so far, without those inside others."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as that of a part, without the parts inside it."""
        self._count()
        self._within.append(name)
        try:
            yield
        finally:
            self._count()
            self._within.pop()

    def run(self, name: str, arguments: Sequence[Any], call: Callable[[], Any], flops: Callable[[], int | None]) -> Any:
        """Call a program and wait for its result; count the time, the compilations and the FLOPs for it."""
        outer = self._within[-1]
        part = _OF_PROGRAM.get(name, outer if outer in ("base states", "candidates") else "candidates")
        key = self._program = name, program_shape(arguments)
        calls = sum(len(runs.calls) for (known, _), runs in self.programs.items() if known == name)
        folder = self.traces / name if self.traces is not None and 0 < calls <= TRACED else None
        began = time.perf_counter()
        try:
            with self.part(part), jax.profiler.trace(str(folder)) if folder else nullcontext():
                result = jax.block_until_ready(call())
        finally:
            self.programs[key].calls.append(time.perf_counter() - began)
            self._program = None
        self.programs[key].flops.add(flops())  # now, as the program is traced
        return result

    def on_event(self, event: str, duration_secs: float, **facts: str | int) -> None:
        """Take note of a compilation; a listener of `jax.monitoring`."""
        if not event.startswith(_COMPILING):
            return
        name = str(facts.get("fun_name", "unknown"))
        if threading.get_ident() != self._thread:  # side by side with others: their time is that of the part that waits for them
            entry = self.programs[name, ()]
            entry.seconds += duration_secs
            entry.compilations += event.endswith("backend_compile_duration")
            return
        began, own = time.perf_counter() - duration_secs, duration_secs
        while self._events and self._events[-1][0] >= began:  # it happened inside this one
            own -= self._events.pop()[1]
        self._events.append((began, duration_secs))
        self.seconds["compile"] += own
        self.seconds[self._within[-1]] -= own
        entry = self.programs[self._program or (name, ())]
        entry.seconds += own
        entry.compilations += event.endswith("backend_compile_duration")

    def fields(self) -> dict[str, Any]:
        """The fields of profile.json, as JSON values."""
        self._count()
        programs = [
            {
                "program": name,
                "shape": list(shape),
                "compilations": runs.compilations,
                "seconds": runs.seconds,
                "calls": len(runs.calls),
                "least_call": min(runs.calls, default=None),
                **dict(zip(("flops", "flops_per_second"), runs.rate(), strict=True)),
            }
            for (name, shape), runs in self.programs.items()
            if runs.compilations or runs.calls
        ]
        return {
            "schema": SCHEMA,
            "seconds": {name: max(0.0, seconds) for name, seconds in self.seconds.items()},
            "programs": sorted(programs, key=lambda program: -program["seconds"]),
        }

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self._within[-1]] += now - self._since
        self._since = now


_current: ContextVar[Profile | None] = ContextVar("profile", default=None)


@contextmanager
def profiled(folder: Path | None, traces: str | None) -> Iterator[None]:
    """Profile all that happens inside and write profile.json into `folder` when it ends well.

    Some calls of each program are traced into the folder `traces`, unless it is "". If either is None, nothing is done.

    Raises:
        UserError: the folder of traces cannot be made, or is on a store.
    """
    if folder is None or traces is None:
        yield
        return
    if traces:
        check_local("--profile", traces)
        try:
            Path(traces).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--profile: cannot write to {traces} ({error.strerror}); name a folder for the traces") from None
    profile = Profile(Path(traces) if traces else None)
    token = _current.set(profile)
    jax.monitoring.register_event_duration_secs_listener(profile.on_event)
    try:
        yield
        replace_file(folder / PROFILE, json_text(profile.fields()).encode())
    finally:
        jax.monitoring.unregister_event_duration_listener(profile.on_event)
        _current.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Count the time inside as that of a part, if a profile is taken."""
    profile = _current.get()
    if profile is None:
        yield
    else:
        with profile.part(name):
            yield


def run(name: str, arguments: Sequence[Any], call: Callable[[], Any], flops: Callable[[], int | None] = lambda: None) -> Any:
    """Call a program, in the profile if one is taken. `flops` tells the arithmetic of this call, None if it depends on data."""
    profile = _current.get()
    return call() if profile is None else profile.run(name, arguments, call, flops)


def program_shape(arguments: Sequence[Any]) -> tuple[int, ...]:
    """Rows, text slots and visual slots of a program over prompts; else the shape of its first array."""
    for argument in arguments:
        layout = getattr(argument, "layout", None)
        if layout is not None:
            bucket = layout.bucket
            return len(layout.num_text), bucket.text, bucket.visual
    return tuple(next((leaf.shape for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "shape")), ()))
