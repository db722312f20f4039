"""Training batches of the embedded model: pages as patches, and lessons, which are many questions about a page in one sequence.

A question of a lesson attends to the page and to itself only, so one pass over a page trains many questions.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array

from rlens_jax.data.pages import CELL, INKS, Cells, Page, Question, make_page, make_question, transcription
from rlens_jax.demo.demo_model import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from rlens_jax.families.qwen2_vl.preparer import patch_places, rope_positions
from rlens_jax.layout import Bucket, TokenLayout, Tokens, pack_layout, pack_rows
from rlens_jax.models.prompt import IGNORE
from rlens_jax.pytrees import pytree

VALUES = (*map(str, range(10)), *INKS)
"""Possible contents of a cell: digits, then inks."""
BUCKET = Bucket(text=256, visual=128)
QUESTIONS = 15
SHARES = {"pages_read": 0.25, "pages_compare": 0.4, "pages_yesno": 0.35}
"""Shares of the questions by dataset; harder ones are more frequent."""
READING_STEPS = 600
"""Number of first steps in which many pages are also transcribed as a whole; without them learning does not start."""


def transcribed_share(step: int) -> float:
    """Share of the pages that are also transcribed as a whole, in a step counted from 0."""
    return 0.4 if step < READING_STEPS else 0.05


@pytree
class TrainBatch:
    """One micro-batch as arrays [B, ...], or all micro-batches of a step, stacked, as arrays [micro, B, ...]."""

    text_ids: Array | np.ndarray
    """int32 [B, X]."""
    targets: Array | np.ndarray
    """int32 [B, X]: the next token if it belongs to an answer, else `IGNORE`."""
    relevant: Array | np.ndarray
    """bool [B, X, P]: the last visual tokens of the cells on which the next answer token depends."""
    segments: Array | np.ndarray
    """int32 [B, T], packed: 0 for the page, 1, 2, ... for the questions."""
    layout: TokenLayout
    rope: Array | np.ndarray
    """int32 [B, 3, T], packed."""
    patches: Array | np.ndarray
    """float32 [B, J, c]."""
    places: Array | np.ndarray
    """int32 [B, J, 2]."""
    num_patches: Array | np.ndarray
    """int32 [B]."""
    cells: Array | np.ndarray
    """int32 [B, P, 4]: digit, ink, row and column of a cell at its last visual token, `IGNORE` at the others."""
    contents: Array | np.ndarray
    """float32 [B, X, 14]: shares of each digit and each ink in the cells on which the next answer token depends."""
    values: Array | np.ndarray
    """int32 [B, X]: digit or ink (10 and up) in the question, at the token before its answer, else `IGNORE`."""


def make_patches(pixels: np.ndarray) -> np.ndarray:
    """Cut uint8 [height, width, 3] into float32 [J, c] in merge order, equal to Hugging Face's image processor (tested)."""
    rows, columns = (side // PATCH_SIZE for side in pixels.shape[:2])
    m, p = MERGE_SIZE, PATCH_SIZE
    x = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    x = x.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    x = np.repeat(x[:, :, :, :, :, None], TEMPORAL_PATCH_SIZE, axis=5)
    return x.reshape(rows * columns, -1)


def cell_corners(page: Page) -> np.ndarray:
    """int [rows, columns]: ordinal of the last (bottom right) visual token of each cell."""
    side = CELL // (PATCH_SIZE * MERGE_SIZE)
    rows, columns = page.digits.shape
    return np.arange(rows * columns * side**2).reshape(rows, side, columns, side)[:, -1, :, -1]


def cell_labels(page: Page) -> np.ndarray:
    """int32 [P, 4]: digit, ink, row and column at the last visual token of each cell, `IGNORE` at the others."""
    side = CELL // (PATCH_SIZE * MERGE_SIZE)
    rows, columns = page.digits.shape
    labels = np.full((rows, side, columns, side, 4), IGNORE, np.int32)
    places = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    labels[:, -1, :, -1] = np.stack([page.digits, page.inks, *places], axis=-1)
    return labels.reshape(-1, 4)


@dataclass(frozen=True)
class Lesson:
    """A page and many questions about it. Each question attends to the page and to itself only.

    Attributes:
        token_ids: int32 [T].
        targets: int32 [T], the next token if it belongs to an answer, else `IGNORE`.
        is_visual: bool [T].
        segments: int32 [T], 0 for the page and the text before it, 1, 2, ... for the questions.
        rope: int32 [T, 3]; every question starts right after the page.
        relevant: bool [T, P], the last visual tokens of the cells on which the next answer token depends.
        contents: float32 [T, 14], shares of each digit and each ink in these cells; zeros without such cells.
        values: int32 [T], index into `VALUES` of the value in the question, at the token before its answer, else `IGNORE`.
    """

    token_ids: np.ndarray
    targets: np.ndarray
    is_visual: np.ndarray
    segments: np.ndarray
    rope: np.ndarray
    relevant: np.ndarray
    contents: np.ndarray
    values: np.ndarray


def make_lesson(page: Page, questions: list[Question], tokens: Mapping[str, int], budget: int) -> Lesson:
    """The lesson of a page; questions that do not fit into `budget` text tokens are left out."""
    grid = (page.pixels.shape[0] // PATCH_SIZE, page.pixels.shape[1] // PATCH_SIZE)
    num_visual = grid[0] * grid[1] // MERGE_SIZE**2
    start = [tokens[t] for t in ("<|im_start|>", "user", "\n", "<|vision_start|>")]
    ids = [*start, *[tokens["<|image_pad|>"]] * num_visual, tokens["<|vision_end|>"]]
    is_page = np.array(ids) == tokens["<|image_pad|>"]
    page_rope, following = rope_positions(is_page, [grid], MERGE_SIZE)
    corners = cell_corners(page)
    cells: list[Cells] = [()] * len(ids)
    targets, segments, ropes = [IGNORE] * len(ids), [0] * len(ids), [page_rope.T]
    values = [IGNORE] * len(ids)
    for number, question in enumerate(questions, 1):
        ask = [tokens[word] for word in question.text.split()]
        ask += [tokens[t] for t in ("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")]
        answer = [*[tokens[word] for word in question.answer.split()], tokens["<|im_end|>"]]
        turn = [*ask, *answer[:-1]]
        if len(ids) + len(turn) - num_visual > budget:
            continue
        ids += turn
        targets += [*[IGNORE] * (len(ask) - 1), *answer]
        cells += [*[()] * (len(ask) - 1), *question.places, ()]
        values += [IGNORE] * len(turn)
        if question.value is not None:
            values[-len(answer)] = VALUES.index(question.value)
        segments += [number] * len(turn)
        ropes.append(np.repeat(following + np.arange(len(turn), dtype=np.int32)[:, None], 3, axis=1))
    return Lesson(
        np.array(ids, np.int32),
        np.array(targets, np.int32),
        np.array(ids, np.int32) == tokens["<|image_pad|>"],
        np.array(segments, np.int32),
        np.concatenate(ropes),
        np.array([np.isin(np.arange(num_visual), [corners[cell] for cell in places]) for places in cells]),
        np.stack([_shares(page, places) for places in cells]),
        np.array(values, np.int32),
    )


def _shares(page: Page, cells: Cells) -> np.ndarray:
    """float32 [14]: shares of each of `VALUES` in these cells; digits and inks each sum to 1, or all are 0."""
    counts = np.zeros(len(VALUES), np.float32)
    for cell in cells:
        counts[page.digits[cell]] += 1
        counts[10 + page.inks[cell]] += 1
    return counts / max(1, len(cells))


def make_batch(rng: np.random.Generator, size: int, tokens: Mapping[str, int], transcribed: float) -> TrainBatch:
    """Draw a batch of augmented training pages; a share `transcribed` of them is also transcribed as a whole."""
    num_slots = BUCKET.visual * MERGE_SIZE**2
    lessons, cells = [], []
    patches = np.zeros((size, num_slots, 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2), np.float32)
    places = np.zeros((size, num_slots, 2), np.int32)
    num_patches = np.zeros(size, np.int32)
    for i in range(size):
        page = make_page(rng, "train", augment=True)
        questions = [transcription(page)] if rng.random() < transcribed else []
        names = rng.choice(list(SHARES), QUESTIONS, p=list(SHARES.values()))
        questions += [make_question(rng, page, str(name)) for name in names]
        lessons.append(make_lesson(page, questions, tokens, BUCKET.text))
        cells.append(cell_labels(page))
        page_patches = make_patches(page.pixels)
        num_patches[i] = len(page_patches)
        patches[i, : len(page_patches)] = page_patches
        grid = (page.pixels.shape[0] // PATCH_SIZE, page.pixels.shape[1] // PATCH_SIZE)
        places[i, : len(page_patches)] = patch_places(grid, MERGE_SIZE)
    layout = pack_layout([Tokens.sequence(lesson.is_visual) for lesson in lessons], BUCKET, range(size))
    return TrainBatch(
        text_ids=pack_rows([lesson.token_ids for lesson in lessons], layout)[:, : BUCKET.text],
        # Empty slots are filled with 0, which must become IGNORE.
        targets=pack_rows([lesson.targets - IGNORE for lesson in lessons], layout)[:, : BUCKET.text] + IGNORE,
        segments=pack_rows([lesson.segments for lesson in lessons], layout),
        layout=layout,
        contents=pack_rows([lesson.contents for lesson in lessons], layout)[:, : BUCKET.text],
        values=pack_rows([lesson.values - IGNORE for lesson in lessons], layout)[:, : BUCKET.text] + IGNORE,
        relevant=pack_rows([lesson.relevant for lesson in lessons], layout)[:, : BUCKET.text],
        rope=pack_rows([lesson.rope for lesson in lessons], layout).transpose(0, 2, 1),
        patches=patches,
        places=places,
        num_patches=num_patches,
        cells=np.stack([np.pad(c, ((0, BUCKET.visual - len(c)), (0, 0)), constant_values=IGNORE) for c in cells]),
    )


def batches(seed: int, start: int, micro_batches: int, size: int, tokens: Mapping[str, int]) -> Iterator[TrainBatch]:
    """Endless training batches [micro, B, ...] from step `start` on, counted from 0.

    A batch depends on seed and step only, so a resumed run continues with the same batches.
    """
    for step in itertools.count(start):
        rng = np.random.default_rng((seed, step))
        parts = [make_batch(rng, size, tokens, transcribed_share(step)) for _ in range(micro_batches)]
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
