"""From samples to rows on the devices: the vision tower runs once per image, since no plan can change its output.

Processes share the work: each encodes the images of the rows that its own work groups compute.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlens_jax.data.samples import Sample
from rlens_jax.engine.encoding import Encoder
from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.pools import Batch, Pool, make_pools
from rlens_jax.engine.preparing import PreparedSplit, prepare
from rlens_jax.engine.shapes import Block, Dealt, Shapes, blocks_of, dealt_rows
from rlens_jax.hosts.processes import Processes
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import Preparer


@dataclass(frozen=True)
class Split:
    """The samples of a split, and their rows."""

    samples: tuple[Sample, ...]
    num_text: np.ndarray
    """int [samples]: text tokens of each sample's longest prompt."""
    num_visual: np.ndarray
    """int [samples]: visual tokens of each sample."""
    image_groups: np.ndarray
    """int [samples]: equal for samples with the same images."""
    pools: tuple[Pool, ...]

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """Batches of all rows."""
        return tuple(batch for pool in self.pools for batch in pool.batches())

    @cached_property
    def num_branches(self) -> np.ndarray:
        """int [samples]: prompts of each sample, one per reference answer."""
        numbers = np.concatenate([pool.samples.ravel() for pool in self.pools])
        return np.bincount(numbers[numbers >= 0], minlength=len(self.samples))

    @property
    def datasets(self) -> dict[str, np.ndarray]:
        """The sample numbers of each dataset, in order of first appearance."""
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, sample in enumerate(self.samples):
            numbers[sample.dataset].append(number)
        return {name: np.array(members) for name, members in numbers.items()}

    @property
    def images(self) -> dict[str, np.ndarray]:
        """The image groups of each dataset's samples, which a bootstrap draws."""
        return {name: self.image_groups[members] for name, members in self.datasets.items()}

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
    *,
    sharing: bool = True,
) -> Split:
    """Prepare and encode samples that fit into the buckets of `shapes`; arguments and errors as of `prepare`."""
    processes = processes or Processes()
    longest = max(bucket.text for bucket in shapes.rows)
    prepared = prepare(samples, preparer, with_answers, processes, sharing=sharing, most_text=longest)
    dealt = dealt_rows(prepared, shapes, programs.groups)
    return encode_split(prepared, programs, shapes, dealt, blocks_of([(prepared, dealt)], shapes, even=False), processes)


def encode_split(
    prepared: PreparedSplit,
    programs: ModelPrograms,
    shapes: Shapes,
    dealt: Dealt,
    blocks: Mapping[Bucket, Block],
    processes: Processes,
    advance: Callable[[], None] = lambda: None,
) -> Split:
    """Encode a prepared split, and put its rows on the devices; every process calls it.

    Args:
        shapes: buckets that hold all rows.
        dealt: the rows of each group in each bucket.
        blocks: of each of these buckets.
        advance: called after the images of each sample or group of samples that this process encodes.
    """
    rows = [number for groups in dealt.values() for group in programs.own_groups for number in groups[group]]
    wanted = list(dict.fromkeys(int(prepared.image_groups[prepared.rows[number].samples[0]]) for number in rows))
    encoder = Encoder(programs, shapes, processes.gather)
    for turn in range(max(processes.gather(len(wanted)))):
        if turn < len(wanted):
            encoder.add(wanted[turn], prepared.images.take(wanted[turn]))
            advance()
        if turn % shapes.batch_size == shapes.batch_size - 1:
            encoder.encode_full()
    num_text, num_visual = prepared.num_tokens.T
    pools = make_pools(prepared, dealt, blocks, encoder.finish(), programs)
    return Split(prepared.samples, num_text, num_visual, prepared.image_groups, tuple(pools))
