"""Batches of a few static shapes for a deployed model. Questions about the same images share a row (`engine.trunks`)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rlens_jax.data.samples import Sample
from rlens_jax.engine.encoding import Encoder
from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.pools import Batch, make_pools
from rlens_jax.engine.preparing import Resize, as_it_is, prepare
from rlens_jax.engine.shapes import Block, Shapes, check_context, dealt_rows, power_of_two, slots_before_visual
from rlens_jax.engine.trunks import Row
from rlens_jax.hosts.processes import Processes
from rlens_jax.models.prompt import Places, Preparer


@dataclass(frozen=True)
class PromptSize:
    """Tokens of a prompt, and what it shares."""

    text: int
    visual: int
    trunk_text: int
    """Text tokens of its row's trunk."""
    sharers: int
    """Prompts in its row, itself included."""

    @property
    def tokens(self) -> int:
        """Text and visual tokens."""
        return self.text + self.visual


@dataclass(frozen=True)
class AskedPrompts:
    """Samples to answer, the size of each prompt, and their batches."""

    samples: tuple[Sample, ...]
    sizes: tuple[PromptSize, ...]
    batches: tuple[Batch, ...]


def prompt_batches(
    samples: Sequence[Sample],
    preparer: Preparer,
    programs: ModelPrograms,
    shapes: Shapes,
    new_tokens: int,
    *,
    sharing: bool,
    marked: bool = False,
    resized: Resize = as_it_is,
) -> AskedPrompts:
    """Encode images, tokenise prompts, and batch them; all devices are of this process.

    Args:
        shapes: its batch size is the number of prompts of a work group in a batch, whether they share rows or not: a batch needs
            room for the new tokens of each.
        new_tokens: most tokens of an answer.
        sharing: whether questions about the same images share a row.
        marked: whether visual tokens have marks behind them, which some ways of pruning need; as in `ModelPrograms.encode`.
        resized: what the preparer gets in place of an image.

    Raises:
        UserError: an image or a prompt that cannot be used, or a prompt that is too long for the model, naming the sample.
    """
    processes, most_text = Processes(), max(bucket.text for bucket in shapes.rows)
    ready = partial(prepare, sharing=sharing, most_text=most_text, most_branches=shapes.batch_size, resized=resized)
    prepared = ready(samples, preparer, False, processes)
    check_context([prepared], programs.config.context, new_tokens, "lower max_new_tokens, or leave them out")
    groups = dict.fromkeys(prepared.image_groups.tolist())
    together = min(shapes.batch_size, power_of_two(len(groups)))
    encoder = Encoder(programs, replace(shapes, batch_size=together), processes.gather, marked=marked)
    for turn, group in enumerate(groups, 1):
        encoder.add(group, prepared.images.take(group))
        if turn % together == 0:
            encoder.encode_full()
    visual, most = encoder.finish(), min(shapes.batch_size, power_of_two(len(samples)))
    places = [min(most, power_of_two(len(row.samples))) for row in prepared.rows]
    dealt = dealt_rows(prepared, shapes, programs.groups)
    leading = slots_before_visual(max(row.leading_text for row in prepared.rows))
    batches: list[Batch] = []
    for branches in sorted(set(places)):
        part = {
            bucket: [[row for row in mine if places[row] == branches] for mine in by_group] for bucket, by_group in dealt.items()
        }
        part = {bucket: by_group for bucket, by_group in part.items() if any(by_group)}
        block = Block(most // branches, Places(branches, 0, leading))
        pools = make_pools(prepared, part, dict.fromkeys(part, block), visual, programs)
        batches += [batch for pool in pools for batch in pool.batches()]
    return AskedPrompts(tuple(samples), _sizes(map(prepared.row, range(len(prepared.rows)))), tuple(batches))


def _sizes(rows: Iterable[Row]) -> tuple[PromptSize, ...]:
    """The sizes of all samples, in order."""
    sizes = {
        number: PromptSize(prompt.num_text, prompt.num_visual, row.branches.trunk - prompt.num_visual, len(row.samples))
        for row in rows
        for number, prompt in zip(row.samples, row.branches.prompts, strict=True)
    }
    return tuple(sizes[number] for number in range(len(sizes)))
