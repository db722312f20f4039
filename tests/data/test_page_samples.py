"""The samples about pages: content, balance, and how questions share pages."""

import itertools
from collections import Counter

import numpy as np
import pytest

from rlens_jax.config import DataConfig
from rlens_jax.data.images import load_images
from rlens_jax.data.page_samples import QUESTIONS_PER_PAGE, draw, read_pages
from rlens_jax.data.pages import DATASETS
from rlens_jax.data.samples import Sample
from rlens_jax.data.splits import load_splits

SAMPLES = {"validation": 24, "test": 12}
Read = dict[str, dict[str, list[Sample]]]


@pytest.fixture(scope="module")
def read() -> Read:
    """Samples by split and dataset."""
    return {split: read_pages(split, count) for split, count in SAMPLES.items()}


def test_samples_are_complete_and_their_own(read: Read) -> None:
    for split, count in SAMPLES.items():
        assert list(read[split]) == list(DATASETS)
        for dataset, samples in read[split].items():
            assert [sample.id for sample in samples] == [f"{dataset}/{split}/{i:06d}" for i in range(count)]
            assert {sample.dataset for sample in samples} == {dataset}


def test_a_page_has_four_different_questions_of_all_datasets(read: Read) -> None:
    """90 pages for 360 samples; the splits share none."""
    pages: dict[str, set[bytes]] = {}
    for split, by_dataset in read.items():
        of_page: dict[bytes, list[Sample]] = {}
        for sample in itertools.chain(*by_dataset.values()):
            of_page.setdefault(sample.images[0], []).append(sample)
        assert len(of_page) == 3 * SAMPLES[split] / QUESTIONS_PER_PAGE
        for samples in of_page.values():
            assert len({sample.question for sample in samples}) == QUESTIONS_PER_PAGE == 4
            assert {sample.dataset for sample in samples} == set(DATASETS)
        pages[split] = set(of_page)
    assert not pages["validation"] & pages["test"]


def test_no_question_repeats_on_a_page() -> None:
    for _, questions in itertools.islice(draw("validation"), 300):
        assert len({question.text for question in questions}) == QUESTIONS_PER_PAGE


def test_image_question_and_answer_belong_together(read: Read) -> None:
    """The same draws made again give the stored pixels and words, without loss."""
    for split, by_dataset in read.items():
        samples = {(sample.images[0], sample.question): sample for sample in itertools.chain(*by_dataset.values())}
        drawn = itertools.islice(draw(split), len(samples) // QUESTIONS_PER_PAGE)
        for page, questions in drawn:
            for question in questions:
                (sample,) = (s for (_, text), s in samples.items() if text == question.text and _shows(s, page.pixels))
                assert (sample.dataset, sample.answers) == (question.dataset, (question.answer,))


def _shows(sample: Sample, pixels: np.ndarray) -> bool:
    return np.array_equal(np.asarray(load_images(sample, "white")[0]), pixels)


def test_yes_and_no_are_exactly_balanced(read: Read) -> None:
    for by_dataset in read.values():
        answers = [sample.answers[0] for sample in by_dataset["pages_yesno"]]
        assert Counter(answers) == {"yes": len(answers) // 2, "no": len(answers) // 2}
        assert len({tuple(pair) for pair in zip(answers[::2], answers[1::2], strict=True)}) == 2  # and not simply in turns


def test_fewer_samples_are_the_first_ones(read: Read) -> None:
    few = read_pages("test", 5)
    assert few == {name: samples[:5] for name, samples in read["test"].items()}


def test_the_samples_of_a_ranking(read: Read) -> None:
    splits = load_splits(DataConfig("pages", validation_samples=24, test_samples=12), lambda item: None, seed=0)
    assert splits == {split: list(itertools.chain(*by_dataset.values())) for split, by_dataset in read.items()}
