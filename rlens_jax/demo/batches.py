"""Training batches for the embedded model: pages as patches, several questions with answers in one sequence.

All turns of a conversation are scored at once, so one page teaches several answers for one look at it.
Axis letters: A micro-batches, B samples, X text slots, P visual slots, J patches, C numbers of a patch.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Array

from rlens_jax.data.pages import CELL, DATASETS, Page, Question, make_page, make_question, transcription
from rlens_jax.demo.processor import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from rlens_jax.layout import Bucket, TokenLayout, pack_layout, pack_rows
from rlens_jax.models.qwen2_vl import patch_places, rope_positions

IGNORE = -1


@dataclass(frozen=True)
class Stage:
    """A part of the training with one mixture of conversations.

    Attributes:
        until: the last step of the stage.
        micro_batches: of how many micro-batches a step's batch is made.
        bucket: static shape of the conversations.
        questions: most questions about a page.
        transcribed: share of the conversations that begin with reading the whole page (what makes learning start at all).
        datasets: where the questions are drawn from, evenly.
    """

    until: int
    micro_batches: int
    bucket: Bucket
    questions: int
    transcribed: float
    datasets: tuple[str, ...]


STAGES = (
    Stage(1100, 3, Bucket(112, 128), 6, 0.4, DATASETS),
    Stage(1600, 2, Bucket(176, 128), 10, 0.1, ("pages_read",)),
    Stage(2300, 2, Bucket(176, 128), 10, 0.05, DATASETS),
)
"""Read first, then look up single places, then everything."""


def stage_of(step: int) -> Stage:
    """The stage that the step, counted from 0, belongs to; the last one goes on for ever."""
    return next((stage for stage in STAGES if step < stage.until), STAGES[-1])


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainBatch:
    """One batch, as arrays [B, ...] (stacked micro-batches [A, B, ...] on their way to the device)."""

    text_ids: Array | np.ndarray
    """int32 [B, X]."""
    targets: Array | np.ndarray
    """int32 [B, X]: the next token where it belongs to an answer, `IGNORE` elsewhere."""
    layout: TokenLayout
    rope: Array | np.ndarray
    """int32 [B, 3, T], packed."""
    patches: Array | np.ndarray
    """float32 [B, J, C]."""
    places: Array | np.ndarray
    """int32 [B, J, 2]."""
    num_patches: Array | np.ndarray
    """int32 [B]."""
    cells: Array | np.ndarray
    """int32 [B, P, 3]: digit, row and column of the cell whose last corner a visual token is, `IGNORE` elsewhere."""


def make_patches(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] to float32 [J, C] in merge order, as Hugging Face's image processor does it (tested equal)."""
    rows, columns = (side // PATCH_SIZE for side in pixels.shape[:2])
    m, p = MERGE_SIZE, PATCH_SIZE
    x = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    x = x.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    x = np.repeat(x[:, :, :, :, :, None], TEMPORAL_PATCH_SIZE, axis=5)
    return x.reshape(rows * columns, -1)


def cell_labels(page: Page) -> np.ndarray:
    """int32 [visual tokens, 3]: digit, row and column at the last (bottom right) visual token of each cell.

    All other tokens hold `IGNORE`.
    """
    side = CELL // (PATCH_SIZE * MERGE_SIZE)
    rows, columns = page.digits.shape
    labels = np.full((rows, side, columns, side, 3), IGNORE, np.int32)
    places = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    labels[:, -1, :, -1] = np.stack([page.digits, *places], axis=-1)
    return labels.reshape(-1, 3)


def conversation(
    page: Page, questions: list[Question], tokens: Mapping[str, int], budget: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A chat about a page: token ids int32 [T], targets int32 [T] and is_visual bool [T].

    Questions that would take more than `budget` text tokens are left out.
    """
    num_visual = page.pixels.shape[0] * page.pixels.shape[1] // (PATCH_SIZE * MERGE_SIZE) ** 2
    ids: list[int] = []
    answered: list[bool] = []
    image = [tokens["<|vision_start|>"], *[tokens["<|image_pad|>"]] * num_visual, tokens["<|vision_end|>"]]
    for question in questions:
        ask = [tokens[t] for t in ("<|im_start|>", "user", "\n")]
        ask += image if not ids else []
        ask += [tokens[word] for word in question.text.split()]
        ask += [tokens[t] for t in ("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")]
        reply = [*[tokens[word] for word in question.answer.split()], tokens["<|im_end|>"]]
        if len(ids) + len(ask) + len(reply) + 1 - num_visual > budget:
            continue
        ids += [*ask, *reply, tokens["\n"]]
        answered += [False] * len(ask) + [True] * len(reply) + [False]
    following = np.roll(np.array(ids, np.int32), -1)
    is_answer = np.roll(np.array(answered), -1)
    return (
        np.array(ids, np.int32),
        np.where(is_answer, following, IGNORE).astype(np.int32),
        np.array(ids, np.int32) == tokens["<|image_pad|>"],
    )


def make_batch(rng: np.random.Generator, size: int, tokens: Mapping[str, int], stage: Stage) -> TrainBatch:
    """A fresh batch of augmented training pages."""
    bucket = stage.bucket
    num_slots = bucket.visual * MERGE_SIZE**2
    ids, targets, masks, ropes, cells = [], [], [], [], []
    patches = np.zeros((size, num_slots, 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2), np.float32)
    places = np.zeros((size, num_slots, 2), np.int32)
    num_patches = np.zeros(size, np.int32)
    for i in range(size):
        page = make_page(rng, "train", augment=True)
        first = [transcription(page)] if rng.random() < stage.transcribed else []
        others = [make_question(rng, page, str(rng.choice(stage.datasets))) for _ in range(stage.questions)]
        sample_ids, sample_targets, is_visual = conversation(page, first + others, tokens, bucket.text)
        grid = (page.pixels.shape[0] // PATCH_SIZE, page.pixels.shape[1] // PATCH_SIZE)
        num_patches[i] = count = grid[0] * grid[1]
        patches[i, :count] = make_patches(page.pixels)
        places[i, :count] = patch_places(grid, MERGE_SIZE)
        ids.append(sample_ids)
        targets.append(sample_targets)
        masks.append(is_visual)
        ropes.append(rope_positions(is_visual, [grid], MERGE_SIZE)[0].T)
        cells.append(cell_labels(page))
    layout = pack_layout(masks, bucket, range(size))
    answered = pack_rows([t + 1 for t in targets], layout)[:, : bucket.text] - 1
    return TrainBatch(
        text_ids=pack_rows(ids, layout)[:, : bucket.text],
        targets=answered,
        layout=layout,
        rope=pack_rows(ropes, layout).transpose(0, 2, 1),
        patches=patches,
        places=places,
        num_patches=num_patches,
        cells=np.stack(
            [np.pad(c, ((0, bucket.visual - len(c)), (0, 0)), constant_values=IGNORE) for c in cells]
        ),
    )


def batches(seed: int, start: int, size: int, tokens: Mapping[str, int]) -> Iterator[TrainBatch]:
    """Endless training batches [A, B, ...] from step `start` on, counted from 0.

    The one of a step depends on seed and step only, so a resumed run goes on alike.
    """
    for step in itertools.count(start):
        stage, rng = stage_of(step), np.random.default_rng((seed, step))
        parts = [make_batch(rng, size, tokens, stage) for _ in range(stage.micro_batches)]
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
