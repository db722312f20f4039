"""What a run can say of itself at any time: its times so far, its rankings so far, and answers to a few samples."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import jax

from rlens_jax.data.samples import Sample
from rlens_jax.engine.generating import generated_texts
from rlens_jax.engine.inputs import build_split
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.session import LoadedModel, Session
from rlens_jax.engine.startup import CompilationCounter
from rlens_jax.plans import Operator, Plan
from rlens_jax.reporting.run_files import Answer, Example, choose_samples
from rlens_jax.resources import versions
from rlens_jax.search.objective import Metrics
from rlens_jax.search.results import Searched, Timing
from rlens_jax.search.search import Ranking


@dataclass
class Clock:
    """Seconds per phase of a run; a new phase ends the one before."""

    phase: str
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """Date and time, ISO 8601."""
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def enter(self, phase: str) -> None:
        """End the current phase and begin another."""
        self.seconds = self.so_far
        self.phase, self.began = phase, time.monotonic()

    @property
    def so_far(self) -> dict[str, float]:
        """Seconds per phase, the current one included."""
        return self.seconds | {self.phase: time.monotonic() - self.began}


@dataclass(frozen=True)
class Conclusion:
    """Makes the results of a run, as far as it has come."""

    session: Session
    clock: Clock
    compilations: CompilationCounter
    batch_size: int

    def searched(self, rankings: Mapping[Operator, Ranking], dense: Metrics, *, provisional: bool) -> Searched:
        """The rankings found so far, with what they depend on; `dense` are the dense metrics on the validation samples."""
        session = self.session
        return Searched(
            config=session.config,
            model_hash=session.folder.weights_hash,
            data_hash=session.data_hash,
            num_layers=session.folder.kind.config.decoder.num_layers,
            buckets=session.buckets,
            versions=versions(),
            validation_samples=session.sizes("validation"),
            test_samples=session.sizes("test"),
            dense_validation=dense,
            rankings=dict(rankings),
            provisional=provisional,
            timing=self._timing(),
        )

    def _timing(self) -> Timing:
        """What differs from one run of the same configuration to the next."""
        session = self.session
        return Timing(
            started=self.clock.started,
            device=jax.devices()[0].device_kind,
            num_devices=jax.device_count(),
            num_cores=os.cpu_count() or 1,
            seconds=self.clock.so_far,
            evaluations=session.journal.num_outcomes - session.resumed,
            resumed=session.resumed,
            compilations=self.compilations.compiled,
            batch_size=self.batch_size,
            prefill={},
        )


def answer_examples(session: Session, loaded: LoadedModel, programs: Programs, plan: Plan, name: str) -> list[Example]:
    """A few samples of a split with the answers that the model generates, dense and under `plan`; on every process.

    The dense model's answer is the reference of a sample that has none.
    """
    samples = choose_samples(session.splits[name].samples)
    split = build_split(samples, loaded.preparer, programs, loaded.shapes, False, processes=session.processes)
    decode = loaded.preparer.chat.decode
    texts = [generated_texts(programs, split, each, decode) for each in (Plan(), plan)]
    return [
        Example.of(sample, loaded.preparer.transparency, *(Answer(text, float(text in sample.answers)) for text in pair))
        for sample, *pair in zip(map(_with_reference, samples, texts[0]), *texts, strict=True)
    ]


def _with_reference(sample: Sample, dense: str) -> Sample:
    return sample if sample.answers else replace(sample, answers=(dense,))
