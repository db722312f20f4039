"""The rows of a split on the devices: a pool per bucket, and batches that take any rows of it.

All work groups compute the same bucket at the same time, each on rows of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.preparing import PreparedSplit
from rlens_jax.engine.shapes import Block, Dealt
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import FILLER, Branches, Prompt, PromptBatch, collate
from rlens_jax.sharding.mesh import put_rows, take_rows


@dataclass(frozen=True, eq=False)
class Pool:
    """All rows of a split in a bucket, R in each work group, filler included. Equal to itself only."""

    inputs: PromptBatch
    """W * R rows on the devices, split over the work groups."""
    visual: Float[np.ndarray, "own_rows P visual_width"]
    """Of this process's groups, on the host: a split's visual tokens may exceed the memory of the devices."""
    samples: Int[np.ndarray, "W R Q"]
    """Number of each branch's sample in the split, or `FILLER`."""
    block_rows: int
    """Rows of each group in a batch, B; R is a multiple."""
    own_groups: Sequence[int]
    """The work groups of this process."""
    mesh: Mesh

    @property
    def bucket(self) -> Bucket:
        return self.inputs.layout.bucket

    @property
    def rows(self) -> int:
        """Rows of each group, R."""
        return self.samples.shape[1]

    def batches(self, order: Int[np.ndarray, "W R"] | None = None) -> list["Batch"]:
        """Batches of all rows, in a given order of each group's rows or as they lie."""
        numbers = np.broadcast_to(np.arange(self.rows, dtype=np.int32), self.samples.shape[:2]) if order is None else order
        return [Batch(self, numbers[:, first : first + self.block_rows]) for first in range(0, self.rows, self.block_rows)]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of a pool that are computed together, B of each work group. Equal to itself only."""

    pool: Pool
    rows: Int[np.ndarray, "W B"]
    """Counted within each group."""

    @cached_property
    def inputs(self) -> PromptBatch:
        """W * B rows on the devices."""
        return take_rows(self.pool.inputs, self.rows, self.pool.mesh)

    @property
    def visual(self) -> Float[np.ndarray, "own_rows P visual_width"]:
        """The visual tokens of the rows of this process's groups, on the host."""
        own = [place * self.pool.rows + self.rows[group] for place, group in enumerate(self.pool.own_groups)]
        return self.pool.visual[np.concatenate(own)]

    @cached_property
    def samples(self) -> Int[np.ndarray, "W B Q"]:
        """Number of each branch's sample in the split, or `FILLER`."""
        return np.take_along_axis(self.pool.samples, self.rows[:, :, None], axis=1)

    @cached_property
    def members(self) -> np.ndarray:
        """The numbers of its samples, ascending."""
        return np.unique(self.samples[self.samples != FILLER])


def make_pools(
    prepared: PreparedSplit,
    dealt: Dealt,
    blocks: Mapping[Bucket, Block],
    visual: Mapping[int, Float[np.ndarray, "P_i visual_width"]],
    programs: ModelPrograms,
) -> list[Pool]:
    """The pools of a split: `visual` has the visual tokens of each group of images that this process's rows need."""
    pools = []
    for bucket, groups in dealt.items():
        block, own = blocks[bucket], programs.own_groups
        count = -(-max(map(len, groups)) // block.rows) * block.rows
        samples = np.full((len(groups), count, block.places.branches), FILLER, np.int32)
        for group, members in enumerate(groups):
            for place, number in enumerate(members):
                numbers = prepared.rows[number].samples
                samples[group, place, : len(numbers)] = numbers
        inputs, packed = _packed(prepared, [groups[group] for group in own], count, bucket, block, visual, programs)
        pools.append(Pool(put_rows(inputs, programs.mesh), packed, samples, block.rows, own, programs.mesh))
    return pools


def _packed(
    prepared: PreparedSplit,
    groups: Sequence[Sequence[int]],
    count: int,
    bucket: Bucket,
    block: Block,
    visual: Mapping[int, np.ndarray],
    programs: ModelPrograms,
) -> tuple[PromptBatch, np.ndarray]:
    """The rows of some groups, each filled up to `count`: the prompts, and the visual tokens [rows, P, visual_width]."""
    axes = len(programs.config.rope_sections)
    filler = Branches.alone(Prompt(np.zeros(1, np.int32), np.zeros(1, bool), np.zeros((axes, 1), np.int32), 1, 0))
    rows, samples, seeds = [], [], []
    # The widest: with marks, a sample without images has fewer numbers.
    plain = np.zeros((0, programs.config.visual_width), programs.dtype)
    like = max(visual.values(), key=lambda tokens: tokens.shape[1], default=plain)
    packed = np.zeros((len(groups) * count, bucket.visual, like.shape[1]), like.dtype)
    for place, members in enumerate(groups):
        for offset, number in enumerate(members):
            row = prepared.row(number)
            tokens = visual[prepared.image_groups[row.samples[0]]]
            packed[place * count + offset, : len(tokens), : tokens.shape[1]] = tokens
            rows.append(row.branches)
            samples.append(row.samples)
            seeds.append(row.seed)
        empty = count - len(members)
        rows += [filler] * empty
        samples += [(FILLER,)] * empty
        seeds += [0] * empty
    return collate(rows, samples, seeds, bucket, block.places), packed
