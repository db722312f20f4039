"""Pages and questions: the answers agree with the drawn digits."""

import re
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from rlens_jax.data import pages
from rlens_jax.data.pages import (
    CELL,
    DATASETS,
    GRIDS,
    INKS,
    SPLITS,
    VOCABULARY,
    Page,
    digit_sources,
    make_page,
    make_question,
    transcription,
)


def test_sources_are_disjoint_complete_and_stratified():
    sources = {split: digit_sources(split) for split in SPLITS}
    assert [len(sources[split]) for split in SPLITS] == [1297, 250, 250]
    assert np.array_equal(np.sort(np.concatenate(list(sources.values()))), np.arange(1797))
    labels = load_digits().target
    for split in SPLITS:
        share = np.bincount(labels[sources[split]]) / len(sources[split])
        assert np.allclose(share, np.bincount(labels) / 1797, atol=0.003)


def test_digits_are_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    amounts, own = pages._digits()
    assert np.array_equal(amounts[:, 1:-1, 1:-1].reshape(1797, 64) * 16, images)
    assert np.array_equal(own, labels)


def test_sources_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        digit_sources("test")[0] = 5


def test_pages_have_their_grid_and_depend_on_the_seed_only():
    shapes = set()
    for seed in range(40):
        page = make_page(np.random.default_rng(seed), "validation", augment=False)
        rows, columns = page.digits.shape
        shapes.add((rows, columns))
        assert page.pixels.shape == (CELL * rows, CELL * columns, 3)
        assert page.pixels.dtype == np.uint8
        assert page.inks.shape == (rows, columns)
        again = make_page(np.random.default_rng(seed), "validation", augment=False)
        assert np.array_equal(page.pixels, again.pixels)
    assert shapes == set(GRIDS)


def cells_of(page: Page) -> np.ndarray:
    """[rows, columns, 16, 16, 3]"""
    rows, columns = page.digits.shape
    return page.pixels.reshape(rows, CELL, columns, CELL, 3).swapaxes(1, 2)


@pytest.mark.parametrize("augment", [False, True])
def test_each_cell_shows_its_digit(augment: bool):
    """A classifier of drawn cells finds the stated digit, so places and labels cannot be mixed up."""
    rng = np.random.default_rng(1)

    def drawn(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        pages = [make_page(rng, split, augment) for _ in range(count)]
        darkness = np.concatenate([255.0 - cells_of(page).min(-1).reshape(-1, CELL * CELL) for page in pages])
        return darkness / darkness.max(1, keepdims=True), np.concatenate([page.digits.ravel() for page in pages])

    images, labels = drawn("train", 60)
    nearest = KNeighborsClassifier(1).fit(images, labels)
    assert nearest.score(*drawn("test", 20)) > 0.85


def test_each_cell_shows_its_ink():
    rng = np.random.default_rng(2)
    for _ in range(10):
        page = make_page(rng, "train", augment=False)
        pixels = cells_of(page).reshape(*page.digits.shape, -1, 3).astype(int)
        darkest = np.take_along_axis(pixels, pixels.min(-1).argmin(-1)[..., None, None], axis=2)[:, :, 0]
        spread = darkest.max(-1) - darkest.min(-1)
        seen = np.where(spread < 60, 0, 1 + darkest.argmax(-1))
        assert (seen == page.inks).mean() > 0.97


def test_augmentation_moves_ink():
    plain, turned = (make_page(np.random.default_rng(3), "train", augment) for augment in (False, True))
    assert np.array_equal(plain.digits, turned.digits)
    assert not np.array_equal(plain.pixels, turned.pixels)


def answer_of(text: str, page: Page) -> str:
    """The answer, computed from the words of the question cell by cell."""
    numbers = [int(word) for word in re.findall(r"\d+", text)]
    digits = [[int(digit) for digit in row] for row in page.digits]
    inks = [[INKS[ink] for ink in row] for row in page.inks]

    def line() -> list[int]:
        name, number = re.search(r"(row|column) (\d)", text).groups()
        return digits[int(number) - 1] if name == "row" else [row[int(number) - 1] for row in digits]

    if text.startswith("digit at"):
        return str(digits[numbers[0] - 1][numbers[1] - 1])
    if text.startswith("ink at"):
        return inks[numbers[0] - 1][numbers[1] - 1]
    if text.startswith("read 3"):
        return " ".join(str(digits[numbers[1] - 1][numbers[2] - 1 + step]) for step in range(3))
    if text.startswith("largest"):
        return str(max(line()))
    if text.startswith("smallest"):
        return str(min(line()))
    if text.startswith("larger"):
        one, other = digits[numbers[0] - 1][numbers[1] - 1], digits[numbers[2] - 1][numbers[3] - 1]
        assert numbers[:2] != numbers[2:]
        return str(max(one, other))
    if text.startswith("how many"):
        return str(inks[numbers[0] - 1].count(text.split()[2]))
    if text.startswith("is there"):
        return "yes" if numbers[0] in digits[numbers[1] - 1] else "no"
    row, column = numbers[0] - 1, numbers[1] - 1
    if len(numbers) == 3:
        return "yes" if digits[row][column] == numbers[2] else "no"
    return "yes" if inks[row][column] == text.split()[-2] else "no"


PATTERNS = {
    "pages_read": {
        r"digit at row \d column \d \?": 0.5,
        r"ink at row \d column \d \?": 0.15,
        r"read 3 digits of row \d from column \d \?": 0.35,
    },
    "pages_compare": {
        r"largest digit of row \d \?": 0.385,
        r"largest digit of column \d \?": 0.165,
        r"smallest digit of row \d \?": 0.175,
        r"smallest digit of column \d \?": 0.075,
        r"larger digit , row \d column \d or row \d column \d \?": 0.1,
        r"how many (black|red|green|blue) digits in row \d \?": 0.1,
    },
    "pages_yesno": {
        r"is row \d column \d a \d \?": 0.45,
        r"is row \d column \d (black|red|green|blue) \?": 0.2,
        r"is there a \d in row \d \?": 0.35,
    },
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_questions_have_the_stated_forms_shares_and_right_answers(dataset: str):
    rng = np.random.default_rng(4)
    kinds: Counter[str] = Counter()
    yes: Counter[str] = Counter()
    pages = [make_page(rng, "train", augment=False) for _ in range(50)]
    count = 4000
    for index in range(count):
        page = pages[index % len(pages)]
        question = make_question(rng, page, dataset)
        assert question.dataset == dataset
        assert question.answer == answer_of(question.text, page), question
        assert set(question.text.split(" ")) <= set(VOCABULARY)
        assert set(question.answer.split(" ")) <= set(VOCABULARY)
        kind = next(pattern for pattern in PATTERNS[dataset] if re.fullmatch(pattern, question.text))
        kinds[kind] += 1
        yes[kind] += question.answer == "yes"
    for pattern, share in PATTERNS[dataset].items():
        assert kinds[pattern] / count == pytest.approx(share, abs=0.04)
        if dataset == "pages_yesno":
            assert yes[pattern] / kinds[pattern] == pytest.approx(0.5, abs=0.06)


def test_yes_and_no_questions_cannot_be_told_apart_by_the_value_asked_for():
    rng = np.random.default_rng(5)
    answers: dict[int, Counter[str]] = {digit: Counter() for digit in range(10)}
    for _ in range(60):
        page = make_page(rng, "train", augment=False)
        for _ in range(100):
            question = make_question(rng, page, "pages_yesno")
            if match := re.search(r"a (\d)", question.text):
                answers[int(match[1])][question.answer] += 1
    for digit, counts in answers.items():
        assert counts["yes"] / counts.total() == pytest.approx(0.5, abs=0.12), digit


def test_transcription():
    page = Page(np.zeros((32, 48, 3), np.uint8), np.array([[1, 2, 3], [4, 5, 6]]), np.zeros((2, 3), int))
    assert (transcription(page).text, transcription(page).answer) == ("read the page", "1 2 3 ; 4 5 6")
    assert transcription(page).places == (((0, 0),), ((0, 1),), ((0, 2),), (), ((1, 0),), ((1, 1),), ((1, 2),))
    assert set(f"{transcription(page).text} {transcription(page).answer}".split(" ")) <= set(VOCABULARY)


def test_vocabulary_has_no_word_twice():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
