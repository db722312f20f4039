"""From samples to batches on the devices: the vision tower runs once per image, ever, since no plan can change its output.

Processes share the work: each prepares an equal share of the samples and keeps it on its own work groups. What all must know (how
many batches of which shape there are, how many tokens each sample has) they tell each other.

Axis letters: B batch (rows of all work groups), P visual slots, W work groups, D width.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from PIL.Image import Image

from rlens_jax.data.samples import Sample, load_image
from rlens_jax.engine.programs import ModelPrograms
from rlens_jax.errors import UserError
from rlens_jax.hosts.processes import Processes
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import PreparedImage, Prompt, PromptBatch, collate
from rlens_jax.sharding.mesh import groups_of, local_rows, put_rows
from rlens_jax.sharding.model_axis import WORK

Gather = Callable[[Any], list[Any]]
"""Every process's value, in the order of the processes."""

ENCODED_PATCHES = 16384
"""Patches that a work group encodes together (our decision): more bring no more speed, and attention among the patches of an
image takes memory."""

FILLER = -1
"""The sample number of rows that only fill a batch."""


@runtime_checkable
class Preparer(Protocol):
    """What a model family does to images and texts before anything is computed."""

    def images(self, pixels: Sequence[Image], sample_id: str) -> Sequence[tuple[PreparedImage, Any]]:
        """All images of a sample, in order: each one's arrays, and what `prompt` must know of it.

        They come together because what a family does to an image may depend on how many there are. Arrays of equal
        shapes make a bucket: they are stacked and go through one program.
        """

    def prompt(self, sample: Sample, images: Sequence[Any], answer: str | None) -> Prompt:
        """The prompt of a sample with what `images` told of its images, and a reference answer if one is given."""


@dataclass(frozen=True)
class Batch:
    """Rows of one bucket that are evaluated together, a block a work group.

    One row a (sample, reference answer), or a sample when it is to be generated; the sample's number in the split is
    `inputs.layout.sample`, or `FILLER`.
    """

    inputs: PromptBatch
    visual: Float[np.ndarray, "rows P D"]
    """Of this process's groups, and on the host: a split's visual tokens may be more than devices hold."""
    filled: tuple[bool, ...]
    """Of each work group, whether its block has any row that is not filler."""


@dataclass(frozen=True)
class Split:
    """The samples of a split, and their batches."""

    samples: tuple[Sample, ...]
    num_text: np.ndarray
    """int [samples]: text tokens of each sample, of the longest of its rows."""
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


@dataclass(frozen=True)
class Shapes:
    """Static shapes of a run: bucket sizes, ascending, and rows per batch of one work group."""

    text_slots: tuple[int, ...]
    visual_slots: tuple[int, ...]
    batch_size: int
    context: int
    """The longest sequence that the model was made for."""

    def bucket(self, prompt: Prompt, sample: Sample) -> Bucket:
        """The smallest bucket that holds the prompt; UserError when none does."""
        if len(prompt.token_ids) > self.context:
            raise UserError(
                f"{sample.id}: {len(prompt.token_ids)} tokens, but the model's context is {self.context}; "
                "leave the sample out or make its images smaller"
            )
        sizes = []
        for field, slots, count in (
            ("text_slots", self.text_slots, prompt.num_text),
            ("visual_slots", self.visual_slots, prompt.num_visual),
        ):
            fitting = [n for n in slots if n >= count]
            if not fitting:
                kind = field.split("_")[0]
                raise UserError(
                    f"{sample.id}: {count} {kind} tokens, but the largest bucket has {max(slots)}; "
                    f"add a larger one to compute.{field}"
                )
            sizes.append(min(fitting))
        return Bucket(*sizes)


@dataclass(frozen=True)
class _Row:
    sample: int
    prompt: Prompt


def build_split(
    samples: Sequence[Sample],
    preparer: Preparer,
    programs: ModelPrograms,
    shapes: Shapes,
    with_answers: bool,
    advance: Callable[[], None],
    processes: Processes | None = None,
) -> Split:
    """Prepare, encode and batch all samples of a split; every process calls it with the same samples.

    Args:
        samples: the split.
        preparer: of the model's family.
        programs: the compiled programs of the run.
        shapes: static shapes.
        with_answers: teacher forcing: one row a reference answer; else one bare prompt a sample.
        advance: called after each of `own_samples`.
        processes: of the run, when it has several.

    Raises:
        UserError: an image or a prompt that cannot be used, naming the sample.
    """
    own = own_samples(len(samples), programs.mesh)
    gather = (processes or Processes()).gather
    encoder, known = _Encoder(programs, shapes.batch_size, gather), {}
    for turn in range(max(gather(len(own)))):
        if turn < len(own):
            sample = samples[own[turn]]
            images = preparer.images([load_image(source, sample.id) for source in sample.images], sample.id)
            encoder.add(own[turn], [image for image, _ in images])
            known[own[turn]] = [facts for _, facts in images]
            advance()
        if turn % shapes.batch_size == shapes.batch_size - 1:
            encoder.encode_full()
    visual = encoder.finish()
    rows = [
        _Row(i, preparer.prompt(samples[i], known[i], answer))
        for i in own
        for answer in (samples[i].answers if with_answers else (None,))
    ]
    num_text, num_visual = _num_tokens(rows, len(samples), gather)
    longest = max(gather(max((row.prompt.answer_length for row in rows), default=0)))
    answer_slots = 1 << max(0, longest - 1).bit_length()
    by_bucket: dict[Bucket, list[_Row]] = defaultdict(list)
    for row in rows:
        by_bucket[shapes.bucket(row.prompt, samples[row.sample])].append(row)
    size = shapes.batch_size * len(_own_groups(programs.mesh))
    batches = []
    for bucket, filled in _batches_of_all(by_bucket, shapes.batch_size, programs.mesh, gather):
        chunk, by_bucket[bucket] = by_bucket[bucket][:size], by_bucket[bucket][size:]
        inputs, packed = _arrays(chunk, size, visual, bucket, answer_slots, programs)
        batches.append(Batch(put_rows(inputs, programs.mesh), packed, filled))
    return Split(tuple(samples), num_text, num_visual, tuple(batches))


def images_together(batch_size: int, patches: int) -> int:
    """How many images of so many patches each a work group encodes at once."""
    return max(1, min(batch_size, ENCODED_PATCHES // patches))


def _own_groups(mesh: Mesh) -> list[int]:
    return groups_of(mesh, jax.process_index())


def own_samples(count: int, mesh: Mesh) -> range:
    """The samples that this process keeps on its groups; processes that share groups have the same ones."""
    groups = _own_groups(mesh)
    return range(groups[0] // len(groups), count, mesh.shape[WORK] // len(groups))


def _num_tokens(rows: Sequence[_Row], count: int, gather: Gather) -> tuple[np.ndarray, np.ndarray]:
    """Text and visual tokens of all samples, on every process."""
    num_text, num_visual = np.zeros(count, int), np.zeros(count, int)
    for told in gather([[row.sample, row.prompt.num_text, row.prompt.num_visual] for row in rows]):
        for sample, text, visual in told:
            num_text[sample] = max(num_text[sample], text)
            num_visual[sample] = visual
    return num_text, num_visual


def _batches_of_all(
    by_bucket: Mapping[Bucket, Sequence[_Row]], batch_size: int, mesh: Mesh, gather: Gather
) -> list[tuple[Bucket, tuple[bool, ...]]]:
    """The bucket of every batch of the split, in the same order on every process, and which groups have rows in it."""
    told = gather([[bucket.visual, bucket.text, len(rows)] for bucket, rows in by_bucket.items()])
    rows_of = [{Bucket(text, visual): count for visual, text, count in process} for process in told]
    buckets = {bucket for process in rows_of for bucket in process}
    batches = []
    for bucket in sorted(buckets, key=lambda b: (b.visual, b.text)):
        blocks = np.zeros(mesh.shape[WORK], int)
        """How many batches of the bucket each group has rows in."""
        for process, counts in enumerate(rows_of):
            groups = groups_of(mesh, process)
            for block in range(-(-counts.get(bucket, 0) // batch_size)):
                blocks[groups[block % len(groups)]] = block // len(groups) + 1
        batches += [(bucket, tuple((blocks > step).tolist())) for step in range(blocks.max())]
    return batches


def _arrays(
    chunk: Sequence[_Row],
    size: int,
    visual: Mapping[int, np.ndarray],
    bucket: Bucket,
    answer_slots: int,
    programs: ModelPrograms,
) -> tuple[PromptBatch, np.ndarray]:
    """This process's rows of a batch, filled up to `size` rows: the prompts, and the visual tokens [size, P, D]."""
    axes = len(programs.config.rope_sections)
    filler = Prompt(np.zeros(1, np.int32), np.zeros(1, bool), np.zeros((axes, 1), np.int32), 1, 0)
    room = size - len(chunk)
    prompts = [*(row.prompt for row in chunk), *[filler] * room]
    samples = [*(row.sample for row in chunk), *[FILLER] * room]
    packed = np.zeros((size, bucket.visual, programs.config.width), programs.dtype)
    for place, row in enumerate(chunk):
        packed[place, : len(visual[row.sample])] = visual[row.sample]
    return collate(prompts, samples, bucket, answer_slots), packed


class _Encoder:
    """Visual tokens of this process's samples; prepared images are large, so they are encoded as soon as they fill a batch.

    All processes encode together: each gives images to its own work groups, or empty ones when it has none of a shape left.
    """

    def __init__(self, programs: ModelPrograms, batch_size: int, gather: Gather):
        self._programs = programs
        self._gather = gather
        self._batch_size, self._groups = batch_size, len(_own_groups(programs.mesh))
        self._waiting: dict[str, list[tuple[int, int, PreparedImage]]] = defaultdict(list)
        """By shapes and types of the arrays."""
        self._encoded: dict[int, list[Any]] = {}

    def add(self, sample: int, images: Sequence[PreparedImage]) -> None:
        """All images of a sample."""
        self._encoded[sample] = [None] * len(images)
        for place, image in enumerate(images):
            kind = json.dumps([[array.shape, array.dtype.str] for array in image.arrays])
            self._waiting[kind].append((sample, place, image))

    def encode_full(self) -> None:
        """Encode all full batches that some process has."""
        self._encode(lambda count, size: count // size)

    def finish(self) -> dict[int, np.ndarray]:
        """For each sample, [P_i, D]: the tokens of all its images in order."""
        self._encode(lambda count, size: -(-count // size))
        nothing = np.zeros((0, self._programs.config.width), self._programs.dtype)
        return {sample: np.concatenate([nothing, *images]) for sample, images in self._encoded.items()}

    def _encode(self, batches: Callable[[int, int], int]) -> None:
        told = self._gather({kind: len(images) for kind, images in self._waiting.items()})
        for kind in sorted({kind for process in told for kind in process}):
            (*leading, _), _ = json.loads(kind)[0]
            size = images_together(self._batch_size, math.prod(leading)) * self._groups
            for _ in range(max(batches(process.get(kind, 0), size) for process in told)):
                self._encode_batch(kind, size)

    def _encode_batch(self, kind: str, size: int) -> None:
        images, self._waiting[kind] = self._waiting[kind][:size], self._waiting[kind][size:]
        stacked = []
        for number, (shape, dtype) in enumerate(json.loads(kind)):
            array = np.zeros((size, *shape), dtype)
            for place, (_, _, image) in enumerate(images):
                array[place] = image.arrays[number]
            stacked.append(array)
        tokens = local_rows(self._programs.encode(*stacked))
        for (sample, place, image), rows in zip(images, tokens, strict=False):
            self._encoded[sample][place] = rows[: image.num_tokens].copy()
