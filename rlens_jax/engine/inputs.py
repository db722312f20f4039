"""From samples to batches on the devices: the vision tower runs once per image, since no plan can change its output.

Processes share the work: each prepares an equal share of the samples and keeps it on its own work groups. They exchange only
counts: batches per shape, and tokens per sample.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from rlens_jax.data.samples import Sample
from rlens_jax.engine.batches import Encoder, batches_of_all, packed_rows
from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.preparing import PreparedSplit, Row, prepare
from rlens_jax.engine.shapes import Shapes
from rlens_jax.hosts.processes import Processes
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import Places, Preparer, PromptBatch
from rlens_jax.sharding.mesh import groups_of, put_rows
from rlens_jax.sharding.model_axis import WORK


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one bucket that are evaluated together, one block per work group. Equal to itself only.

    A row is a pair of a sample and a reference answer, or a sample when the answer is to be generated. Its sample's number in
    the split is in `inputs.samples`, or `FILLER`.
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
    processes: Processes | None = None,
) -> Split:
    """Prepare, encode and batch samples that fit into the buckets of `shapes`; arguments and errors as of `prepare`."""
    processes = processes or Processes()
    prepared = prepare(samples, preparer, own_samples(len(samples), programs.mesh), with_answers, processes.gather)
    return encode_split(prepared, programs, shapes, answer_places([prepared]), processes)


def encode_split(
    prepared: PreparedSplit,
    programs: ModelPrograms,
    shapes: Shapes,
    places: Places,
    processes: Processes,
    advance: Callable[[], None] = lambda: None,
) -> Split:
    """Encode and batch a prepared split; every process calls it.

    Args:
        shapes: buckets that hold all rows.
        places: those of each row.
        advance: called after each of this process's samples.
    """
    own, gather = prepared.own, processes.gather
    encoder = Encoder(programs, shapes, gather)
    for turn in range(max(gather(len(own)))):
        if turn < len(own):
            encoder.add(own[turn], prepared.images.take(own[turn]))
            advance()
        if turn % shapes.batch_size == shapes.batch_size - 1:
            encoder.encode_full()
    visual = encoder.finish()
    by_bucket: dict[Bucket, list[Row]] = defaultdict(list)
    for row in prepared.rows:
        by_bucket[shapes.row((row.prompt.num_text, row.prompt.num_visual))].append(row)
    size = shapes.batch_size * len(programs.own_groups)
    batches = []
    for bucket, filled in batches_of_all(by_bucket, shapes.batch_size, programs.mesh, gather):
        chunk, by_bucket[bucket] = by_bucket[bucket][:size], by_bucket[bucket][size:]
        inputs, packed = packed_rows(chunk, size, visual, bucket, places, programs)
        batches.append(Batch(put_rows(inputs, programs.mesh), packed, filled))
    num_text, num_visual = prepared.num_tokens.T
    return Split(prepared.samples, num_text, num_visual, tuple(batches))


def answer_places(splits: Iterable[PreparedSplit]) -> Places:
    """Places for the tokens of any answer, one size for all splits: each size is compiled."""
    return Places(1, 1 << max(0, max(split.longest_answer for split in splits) - 1).bit_length())


def own_samples(count: int, mesh: Mesh) -> range:
    """The samples that this process keeps on its groups; processes that share groups have the same ones."""
    groups = groups_of(mesh, jax.process_index())
    return range(groups[0] // len(groups), count, mesh.shape[WORK] // len(groups))
