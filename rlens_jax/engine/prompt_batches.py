"""Batches of a few static shapes for a deployed model. Questions about the same images share a row (`engine.trunks`)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from rlens_jax.data.samples import Sample
from rlens_jax.engine.encoding import Encoder
from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.preparing import prepare
from rlens_jax.engine.shapes import Shapes, check_context, power_of_two
from rlens_jax.engine.trunks import Row
from rlens_jax.hosts.processes import Processes
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import FILLER, Branches, Places, Preparer, Prompt, PromptBatch, collate
from rlens_jax.sharding.mesh import put_rows


@dataclass(frozen=True)
class PromptSize:
    """Tokens of a prompt, and what it shares."""

    text: int
    visual: int
    trunk_text: int
    """Text tokens of its row's trunk."""
    sharers: int
    """Prompts in its row, itself included."""


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Rows of one bucket that are answered together."""

    inputs: PromptBatch
    """On the devices, split over the work groups."""
    visual: Float[np.ndarray, "rows P D"]
    """On the host."""


@dataclass(frozen=True)
class AskedPrompts:
    """Samples to answer, the size of each prompt, and their batches."""

    samples: tuple[Sample, ...]
    sizes: tuple[PromptSize, ...]
    batches: tuple[PromptRows, ...]


def prompt_batches(
    samples: Sequence[Sample], preparer: Preparer, programs: ModelPrograms, shapes: Shapes, new_tokens: int, *, sharing: bool
) -> AskedPrompts:
    """Encode images, tokenise prompts, and batch them; all devices are of this process.

    Args:
        shapes: its batch size is the number of prompts of a work group in a batch, whether they share rows or not: a batch needs
            room for the new tokens of each.
        new_tokens: most tokens of an answer.
        sharing: whether questions about the same images share a row.

    Raises:
        UserError: an image or a prompt that cannot be used, or a prompt that is too long for the model, naming the sample.
    """
    most_text, processes = max(bucket.text for bucket in shapes.rows), Processes()
    share = partial(prepare, sharing=sharing, most_text=most_text, most_branches=shapes.batch_size)
    prepared = share(samples, preparer, False, processes)
    check_context([prepared], programs.config.context, new_tokens, "lower max_new_tokens, or leave them out")
    rows = [prepared.row(number) for number in range(len(prepared.rows))]
    groups = dict.fromkeys(prepared.image_groups.tolist())
    together = min(shapes.batch_size, power_of_two(len(groups)))
    encoder = Encoder(programs, replace(shapes, batch_size=together), processes.gather)
    for turn, group in enumerate(groups, 1):
        encoder.add(group, prepared.images.take(group))
        if turn % together == 0:
            encoder.encode_full()
    visual = encoder.finish()
    most = min(shapes.batch_size, power_of_two(len(samples)))
    by_shape: dict[tuple[Bucket, int], list[Row]] = defaultdict(list)
    for row in rows:
        bucket = shapes.row((row.branches.num_text, row.branches.num_visual))
        by_shape[bucket, min(most, power_of_two(len(row.samples)))].append(row)
    batches = []
    for bucket, branches in sorted(by_shape, key=lambda shape: (shape[0].visual, shape[0].text, shape[1])):
        alike, size = by_shape[bucket, branches], most // branches * programs.groups
        for start in range(0, len(alike), size):
            part = alike[start : start + size]
            tokens = [visual[prepared.image_groups[row.samples[0]]] for row in part]
            batches.append(_batch(part, tokens, size, bucket, branches, programs))
    return AskedPrompts(tuple(samples), _sizes(rows), tuple(batches))


def _batch(
    rows: Sequence[Row], visual: Sequence[np.ndarray], size: int, bucket: Bucket, branches: int, programs: ModelPrograms
) -> PromptRows:
    """Rows with their visual tokens [P_i, D], filled up to `size` rows."""
    axes = len(programs.config.rope_sections)
    filler = Branches.alone(Prompt(np.zeros(1, np.int32), np.zeros(1, bool), np.zeros((axes, 1), np.int32), 1, 0))
    room = size - len(rows)
    packed = np.zeros((size, bucket.visual, programs.config.width), programs.dtype)
    for place, tokens in enumerate(visual):
        packed[place, : len(tokens)] = tokens
    inputs = collate(
        [*(row.branches for row in rows), *[filler] * room],
        [*(row.samples for row in rows), *[(FILLER,)] * room],
        [*(row.seed for row in rows), *[0] * room],
        bucket,
        Places(branches, 0),
    )
    return PromptRows(put_rows(inputs, programs.mesh), packed)


def _sizes(rows: Sequence[Row]) -> tuple[PromptSize, ...]:
    """The sizes of all samples, in order."""
    sizes = {
        number: PromptSize(prompt.num_text, prompt.num_visual, row.branches.trunk - prompt.num_visual, len(row.samples))
        for row in rows
        for number, prompt in zip(row.samples, row.branches.prompts, strict=True)
    }
    return tuple(sizes[number] for number in range(len(sizes)))
