"""What a run can say of itself at any time: its times so far, its rankings so far, and answers to a few samples."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import jax
import numpy as np

from rlens_jax.console import say
from rlens_jax.data.images import load_images
from rlens_jax.data.samples import Sample
from rlens_jax.engine.generating import generated_texts
from rlens_jax.engine.inputs import build_split
from rlens_jax.engine.peak_memory import device_peak
from rlens_jax.engine.preparing import prompts_of
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.seen import overlaps, see, token_grid
from rlens_jax.engine.session import LoadedModel, Session
from rlens_jax.engine.startup import CompilationCounter
from rlens_jax.plans import Operator, Plan
from rlens_jax.reporting.run_files import Answer, Example, choose_samples, write_examples
from rlens_jax.reporting.seen_files import SeenSample, write_seen
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
            peak_memory_bytes=device_peak(),
            compilations=self.compilations.compiled,
            batch_size=self.batch_size,
            prefill={},
        )


def write_samples(session: Session, loaded: LoadedModel, programs: Programs, plan: Plan, name: str) -> None:
    """Write examples.json and, if the configuration asks for it, seen.json, which `write_report` then shows; on every process.

    UserError if a file cannot be written.
    """
    config, processes = session.config, session.processes
    hashes, output = {"model_hash": session.folder.weights_hash, "data_hash": session.data_hash}, config.folder
    examples = answer_examples(session, loaded, programs, plan, name)
    if processes.leads:
        write_examples(output, examples, plan, **hashes)
    if config.report.samples and processes.count > 1:
        say("report.samples has no effect in a run of several processes")
    elif config.report.samples and (seen := seen_samples(session, loaded, programs, name)):
        write_seen(output, seen, config.reduction, programs.config.ffn_width, **hashes)


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


def seen_samples(session: Session, loaded: LoadedModel, programs: Programs, name: str) -> list[SeenSample]:
    """Where the redundancy of the first samples of a split is, of as many different images as the configuration says.

    Fewer, if the split has fewer images, and none without images.
    """
    config, preparer, model = session.config, loaded.preparer, programs.model()
    split = session.splits[name]
    first = [sample for number, sample in enumerate(split.samples) if sample.images and split.image_groups[number] == number]
    seen, shown = [], first[: config.report.samples]
    for sample in shown:
        images = load_images(sample, preparer.transparency)
        prepared = preparer.images(images, sample.id)
        (prompt,) = prompts_of(replace(sample, own=None), [image.tokens for image in prepared], preparer, False)
        seen.append((images[0], prepared[0].tokens, see(model, prepared, prompt, config.reduction)))
    if not seen:
        return []
    common = overlaps(np.stack([each.kept for *_, each in seen]), programs.config.ffn_width).sum(axis=1) - 1
    side = session.folder.kind.family.grid(session.folder.kind.config)
    return [
        SeenSample(
            sample=sample,
            image=image,
            grid=token_grid(tokens, side),
            attention=each.attention,
            overlap=others / max(1, len(seen) - 1),
            attention_map=each.attention_map[: tokens.count],
            survival_map=each.survival_map[: tokens.count],
        )
        for sample, (image, tokens, each), others in zip(shown, seen, common, strict=True)
    ]


def _with_reference(sample: Sample, dense: str) -> Sample:
    return sample if sample.answers else replace(sample, answers=(dense,))
