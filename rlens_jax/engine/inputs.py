"""From samples to batches on the devices: the vision tower runs once per image, since no plan can change its output.

Processes share the work: each prepares an equal share of the samples and keeps it on its own work groups. They exchange only
counts: batches per shape, and tokens per sample.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rlens_jax.data.images import load_images
from rlens_jax.data.samples import Sample
from rlens_jax.engine.batches import Encoder, Row, batches_of_all, count_tokens, packed_rows
from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.sizes import Shapes
from rlens_jax.hosts.processes import Processes
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import Preparer, PromptBatch
from rlens_jax.sharding.mesh import put_rows


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one bucket that are evaluated together, one block per work group. Equal to itself only.

    A row is a pair of a sample and a reference answer, or a sample when the answer is to be generated. Its sample's number in
    the split is `inputs.layout.sample`, or `FILLER`.
    """

    inputs: PromptBatch
    visual: Float[np.ndarray, "rows P D"]
    """Rows of this process's groups, on the host: a split's visual tokens may exceed the memory of the devices."""
    filled: tuple[bool, ...]
    """Whether the block of each work group has any row that is not filler."""


@dataclass(frozen=True)
class Split:
    """The samples of a split, and their batches."""

    samples: tuple[Sample, ...]
    num_text: np.ndarray
    """int [samples]: text tokens of each sample's longest row."""
    num_visual: np.ndarray
    """int [samples]: visual tokens of each sample."""
    batches: tuple[Batch, ...]

    @property
    def datasets(self) -> dict[str, np.ndarray]:
        """The sample numbers of each dataset, in order of first appearance."""
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, sample in enumerate(self.samples):
            numbers[sample.dataset].append(number)
        return {name: np.array(members) for name, members in numbers.items()}

    @property
    def num_tokens(self) -> list[tuple[int, int]]:
        """Text and visual tokens of each sample."""
        return list(zip(self.num_text.tolist(), self.num_visual.tolist(), strict=True))

    @property
    def sizes(self) -> dict[str, int]:
        """Samples per dataset."""
        return {name: len(members) for name, members in self.datasets.items()}


def build_split(
    samples: Sequence[Sample],
    preparer: Preparer,
    programs: ModelPrograms,
    shapes: Shapes,
    with_answers: bool,
    advance: Callable[[], None] = lambda: None,
    processes: Processes | None = None,
) -> Split:
    """Prepare, encode and batch all samples of a split; every process calls it with the same samples.

    Args:
        with_answers: one row per reference answer, for teacher forcing; else one bare prompt per sample.
        advance: called after each of `own_samples`.
        processes: the processes of the run, if it has several.

    Raises:
        UserError: an image or a prompt that cannot be used, naming the sample.
    """
    own = own_samples(len(samples), programs)
    gather = (processes or Processes()).gather
    encoder, tokens = Encoder(programs, shapes.batch_size, gather), {}
    for turn in range(max(gather(len(own)))):
        if turn < len(own):
            sample = samples[own[turn]]
            images = preparer.images(load_images(sample, preparer.transparency), sample.id)
            encoder.add(own[turn], images)
            tokens[own[turn]] = [image.tokens for image in images]
            advance()
        if turn % shapes.batch_size == shapes.batch_size - 1:
            encoder.encode_full()
    visual = encoder.finish()
    rows = [
        Row(i, preparer.prompt(samples[i], tokens[i], answer))
        for i in own
        for answer in (samples[i].answers if with_answers else (None,))
    ]
    num_text, num_visual = count_tokens(rows, len(samples), gather)
    longest = max(gather(max((row.prompt.answer_length for row in rows), default=0)))
    answer_slots = 1 << max(0, longest - 1).bit_length()
    by_bucket: dict[Bucket, list[Row]] = defaultdict(list)
    for row in rows:
        by_bucket[shapes.bucket(row.prompt, samples[row.sample])].append(row)
    size = shapes.batch_size * len(programs.own_groups)
    batches = []
    for bucket, filled in batches_of_all(by_bucket, shapes.batch_size, programs.mesh, gather):
        chunk, by_bucket[bucket] = by_bucket[bucket][:size], by_bucket[bucket][size:]
        inputs, packed = packed_rows(chunk, size, visual, bucket, answer_slots, programs)
        batches.append(Batch(put_rows(inputs, programs.mesh), packed, filled))
    return Split(tuple(samples), num_text, num_visual, tuple(batches))


def own_samples(count: int, programs: ModelPrograms) -> range:
    """The samples that this process keeps on its groups; processes that share groups have the same ones."""
    groups = programs.own_groups
    return range(groups[0] // len(groups), count, programs.groups // len(groups))
