"""Pages of real handwritten digits, and questions about them whose answers are known.

The digits are the 1797 test images of the UCI "Optical Recognition of Handwritten Digits" set (E. Alpaydin, C. Kaynak, 1998;
CC BY 4.0): 8x8 pixels, 17 grey levels. digits.csv.gz is the file of `sklearn.datasets.load_digits` (BSD-3-Clause); importing
scikit-learn takes two seconds. A page is a grid of cells of 16x16 pixels with one digit per cell, in one of four inks. A
question names places by row and column, so the answer depends on the image. Everything here is our decision.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Split = Literal["train", "validation", "test"]
Cells = tuple[tuple[int, int], ...]
"""(row, column), from 0, of some cells of a page."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DATASETS = ("pages_read", "pages_compare", "pages_yesno")
INKS = ("black", "red", "green", "blue")
GRIDS = ((4, 8), (8, 4))
"""(rows, columns) of a page."""
CELL = 16
"""Side of a cell in pixels."""

READ_WEIGHTS = {"digit": 0.5, "ink": 0.15, "three": 0.35}
COMPARE_WEIGHTS = {"largest": 0.55, "smallest": 0.25, "larger": 0.1, "how many": 0.1}
YESNO_WEIGHTS = {"digit": 0.45, "ink": 0.2, "there": 0.35}
COLUMN_SHARE = 0.3
"""Share of the largest/smallest questions about a column; the others are about a row."""

VOCABULARY: tuple[str, ...] = (
    *(str(digit) for digit in range(10)),
    *INKS,
    *("user", "assistant", "system"),
    *("?", ",", ";"),
    *("digit", "digits", "ink", "at", "row", "column", "read", "of", "from", "to", "the", "page"),
    *("largest", "smallest", "larger", "how", "many", "in", "or"),
    *("is", "a", "there", "yes", "no"),
)
"""All words of questions, answers and the chat template, in the order of their token ids. No question has "to"."""

_SPLIT_SEED = 20250119
_HELD_OUT_SHARE = 0.14
_INK_RGB = np.array([[30, 30, 34], [200, 34, 40], [24, 128, 48], [36, 60, 196]], np.float32)


@dataclass(frozen=True)
class Page:
    """A grid of digits.

    Attributes:
        pixels: uint8 [16 * rows, 16 * columns, 3], RGB.
        digits: the digit in each cell, int64 [rows, columns].
        inks: the ink of each cell as an index into INKS, int64 [rows, columns].
    """

    pixels: np.ndarray
    digits: np.ndarray
    inks: np.ndarray


@dataclass(frozen=True)
class Question:
    """A question about a page.

    Attributes:
        dataset: one of DATASETS.
        text, answer: lower-case words of VOCABULARY, separated by single spaces.
        places: per word of the answer, the cells that decide it.
        value: the digit or ink that the question names, if any.
    """

    dataset: str
    text: str
    answer: str
    places: tuple[Cells, ...]
    value: str | None = None


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Amount of ink, float32 [1797, 10, 10] in 0..1 with an empty border of one pixel, and labels, int64 [1797]."""
    table = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",", dtype=np.float32)
    amount = table[:, :-1].reshape(-1, 8, 8) / 16
    return np.pad(amount, ((0, 0), (1, 1), (1, 1))), table[:, -1].astype(np.int64)


@functools.cache
def digit_sources(split: Split) -> np.ndarray:
    """The digits of a split: sorted indices into `load_digits`, int64 [about 1300, 250 or 250]. The splits are disjoint.

    Each digit is split separately with a fixed seed, so every split has the same mix of digits.
    """
    _, labels = _digits()
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen: list[np.ndarray] = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit))
        held_out = round(_HELD_OUT_SHARE * len(order))
        validation, test, train = np.split(order, [held_out, 2 * held_out])
        chosen.append({"train": train, "validation": validation, "test": test}[split])
    indices = np.sort(np.concatenate(chosen))
    indices.flags.writeable = False  # cached, so callers must not change it
    return indices


def make_page(rng: np.random.Generator, split: Split, augment: bool) -> Page:
    """A random page with digits of `split`; `augment` (for training) also rotates and slants each digit a little.

    Takes about half a millisecond.
    """
    amount, labels = _digits()
    rows, columns = GRIDS[rng.integers(len(GRIDS))]
    cells = rows * columns
    sources = rng.choice(digit_sources(split), cells)
    inks = rng.integers(len(INKS), size=cells)

    drawn = _draw(rng, amount[sources], augment)
    drawn *= rng.uniform(0.85, 1.2, (cells, 1, 1)).astype(np.float32)  # pressure of the pen
    np.minimum(drawn, 1, out=drawn)
    colours = _INK_RGB[inks] + rng.uniform(-16, 16, (cells, 3)).astype(np.float32)

    def as_page(cellwise: np.ndarray) -> np.ndarray:
        """[cells, 16, 16, ...] -> [16 * rows, 16 * columns, ...]"""
        split_up = cellwise.reshape(rows, columns, CELL, CELL, -1).transpose(0, 2, 1, 3, 4)
        return split_up.reshape(rows * CELL, columns * CELL, -1)

    opacity = as_page(drawn)
    ink = as_page(np.broadcast_to(colours[:, None, None], (cells, CELL, CELL, 3)))
    paper = rng.uniform(232, 252, 3).astype(np.float32) + _texture(rng, rows, columns)
    pixels = paper + opacity * (ink - paper)
    pixels += 2.5 * rng.standard_normal((*pixels.shape[:2], 1), np.float32)
    return Page(
        pixels=np.clip(np.rint(pixels), 0, 255).astype(np.uint8),
        digits=labels[sources].reshape(rows, columns),
        inks=inks.reshape(rows, columns),
    )


def _draw(rng: np.random.Generator, amount: np.ndarray, augment: bool) -> np.ndarray:
    """Enlarge float32 [cells, 10, 10] to [cells, 16, 16], bilinear, each digit with a random size and place."""
    cells = len(amount)
    size = rng.uniform(12, 15.5, cells)
    room = (CELL - size) / 2
    centre_y, centre_x = CELL / 2 + room * rng.uniform(-1, 1, (2, cells))
    turn, slant = rng.uniform(-0.15, 0.15, (2, cells)) if augment else np.zeros((2, cells))

    def column(per_cell: np.ndarray) -> np.ndarray:
        return per_cell.astype(np.float32)[:, None, None]

    pixel = np.arange(CELL, dtype=np.float32) + np.float32(0.5)
    away_y = pixel[None, :, None] - column(centre_y)
    away_x = pixel[None, None, :] - column(centre_x)
    scale = 8 / size
    # The place in the source for each pixel of the cell.
    along, across = column(scale * np.cos(turn)), scale * np.sin(turn)
    middle = np.float32(4.5)  # of the padded source, in pixel indices
    source_y = along * away_y - column(across) * away_x + middle
    source_x = column(across + scale * slant) * away_y + along * away_x + middle
    np.clip(source_y, 0, 8.999, out=source_y)
    np.clip(source_x, 0, 8.999, out=source_x)
    top, left = source_y.astype(np.int64), source_x.astype(np.int64)
    down, right = source_y - top, source_x - left
    flat = amount.ravel()
    corner = np.arange(cells)[:, None, None] * 100 + top * 10 + left
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + 10] * (1 - right) + flat[corner + 11] * right
    return upper * (1 - down) + lower * down


def _texture(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Texture of the paper, float32 [16 * rows, 16 * columns, 1]: waves of a few grey levels."""
    y = np.arange(rows * CELL, dtype=np.float32)[:, None]
    x = np.arange(columns * CELL, dtype=np.float32)[None, :]
    frequency = rng.uniform(0.02, 0.15, 2).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    return (2.5 * np.sin(frequency[0] * y + phase[0]) * np.sin(frequency[1] * x + phase[1]))[..., None]


def make_question(rng: np.random.Generator, page: Page, dataset: str) -> Question:
    """A random question of `dataset` (one of DATASETS) about `page`."""
    makers = {"pages_read": _read, "pages_compare": _compare, "pages_yesno": _yesno}
    return Question(dataset, *makers[dataset](rng, page))


def transcription(page: Page) -> Question:
    """The question for all digits of a page."""
    places: list[Cells] = []
    for row in range(len(page.digits)):
        places += [()] if row else []  # the semicolon between two rows
        places += [(cell,) for cell in _row_cells(page, row)]
    return Question("transcription", "read the page", " ; ".join(map(_words, page.digits)), tuple(places))


def _row_cells(page: Page, row: int) -> Cells:
    return tuple((row, column) for column in range(page.digits.shape[1]))


_Parts = tuple[str, str, tuple[Cells, ...], str | None]
"""Text, answer, places and value of a question."""


def _words(digits: np.ndarray) -> str:
    return " ".join(str(digit) for digit in digits)


def _kind(rng: np.random.Generator, weights: dict[str, float]) -> str:
    return str(rng.choice(list(weights), p=list(weights.values())))


def _place(rng: np.random.Generator, page: Page) -> tuple[tuple[int, int], str]:
    """A random cell: its index, and its name in words."""
    rows, columns = page.digits.shape
    row, column = int(rng.integers(rows)), int(rng.integers(columns))
    return (row, column), f"row {row + 1} column {column + 1}"


def _read(rng: np.random.Generator, page: Page) -> _Parts:
    kind = _kind(rng, READ_WEIGHTS)
    if kind == "three":
        rows, columns = page.digits.shape
        row, start = int(rng.integers(rows)), int(rng.integers(columns - 2))
        text = f"read 3 digits of row {row + 1} from column {start + 1} ?"
        cells = tuple((cell,) for cell in _row_cells(page, row)[start : start + 3])
        return text, _words(page.digits[row, start : start + 3]), cells, None
    cell, place = _place(rng, page)
    if kind == "ink":
        return f"ink at {place} ?", INKS[page.inks[cell]], ((cell,),), None
    return f"digit at {place} ?", str(page.digits[cell]), ((cell,),), None


def _compare(rng: np.random.Generator, page: Page) -> _Parts:
    kind = _kind(rng, COMPARE_WEIGHTS)
    rows, columns = page.digits.shape
    if kind == "larger":
        one, other = rng.choice(rows * columns, 2, replace=False)
        names = [f"row {cell // columns + 1} column {cell % columns + 1}" for cell in (one, other)]
        both = ((int(one) // columns, int(one) % columns), (int(other) // columns, int(other) % columns))
        return f"larger digit , {names[0]} or {names[1]} ?", str(page.digits.ravel()[[one, other]].max()), (both,), None
    if kind == "how many":
        row, ink = int(rng.integers(rows)), int(rng.integers(len(INKS)))
        count = str(np.sum(page.inks[row] == ink))
        return f"how many {INKS[ink]} digits in row {row + 1} ?", count, (_row_cells(page, row),), INKS[ink]
    if rng.random() < COLUMN_SHARE:
        column = int(rng.integers(columns))
        name, digits, cells = f"column {column + 1}", page.digits[:, column], tuple((row, column) for row in range(rows))
    else:
        row = int(rng.integers(rows))
        name, digits, cells = f"row {row + 1}", page.digits[row], _row_cells(page, row)
    extreme = digits.max() if kind == "largest" else digits.min()
    return f"{kind} digit of {name} ?", str(extreme), (cells,), None


def _yesno(rng: np.random.Generator, page: Page) -> _Parts:
    """Draws the answer first, evenly, and then a value that makes it right."""
    kind = _kind(rng, YESNO_WEIGHTS)
    yes = bool(rng.random() < 0.5)
    answer = "yes" if yes else "no"
    if kind == "there":
        row = int(rng.integers(len(page.digits)))
        # A row has at most 8 cells, so at least one digit is present and at least one is absent.
        present = np.isin(np.arange(10), page.digits[row])
        digit = rng.choice(np.flatnonzero(present == yes))
        return f"is there a {digit} in row {row + 1} ?", answer, (_row_cells(page, row),), str(digit)
    cell, place = _place(rng, page)
    if kind == "ink":
        ink = page.inks[cell] if yes else (page.inks[cell] + rng.integers(1, len(INKS))) % len(INKS)
        return f"is {place} {INKS[ink]} ?", answer, ((cell,),), INKS[ink]
    digit = page.digits[cell] if yes else (page.digits[cell] + rng.integers(1, 10)) % 10
    return f"is {place} a {digit} ?", answer, ((cell,),), str(digit)
