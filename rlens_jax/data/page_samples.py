"""Samples of the embedded model's datasets: pages first, then questions about each, drawn anew in every run.

    samples = read_pages("validation", 120)["pages_read"]

A page has `QUESTIONS_PER_PAGE` questions: one of each dataset, and one more of the datasets in turn. So three pages give each of
the three datasets four questions, and all datasets ask about the same pages. Nothing is stored: 90 pages take 0.3 s.
"""

import io
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image

from rlens_jax.data.pages import DATASETS, SPLITS, Page, Question, make_page, make_question
from rlens_jax.data.samples import Sample

QUESTIONS_PER_PAGE = 4
TEST_SAMPLES = 300
"""Held-out samples per dataset that an evaluation takes unless it says how many."""


def draw(split: Literal["validation", "test"]) -> Iterator[tuple[Page, list[Question]]]:
    """Pages with their questions, without end and the same in every call; no two questions of a page are equal.

    Of two successive answers of `pages_yesno`, one is yes and one is no, in random order.
    """
    rng = np.random.default_rng(SPLITS.index(split))
    yes_or_no = _yes_or_no(rng)
    for extra in itertools.cycle(DATASETS):
        page = make_page(rng, split, augment=False)
        questions: dict[str, Question] = {}
        for dataset in (*DATASETS, extra):
            answer = next(yes_or_no) if dataset == "pages_yesno" else None
            question = make_question(rng, page, dataset)
            while question.text in questions or answer not in (None, question.answer):
                question = make_question(rng, page, dataset)
            questions[question.text] = question
        yield page, list(questions.values())


def _yes_or_no(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield from rng.permutation(("yes", "no")).tolist()


def read_pages(split: Literal["validation", "test"], samples: int) -> dict[str, list[Sample]]:
    """The first `samples` samples of each dataset; the images are PNG bytes."""
    found: dict[str, list[Sample]] = {name: [] for name in DATASETS}
    for page, questions in draw(split):
        png = io.BytesIO()
        Image.fromarray(page.pixels).save(png, "png")
        images = (png.getvalue(),)
        for question in questions:
            own = found[question.dataset]
            if len(own) < samples:
                name = f"{question.dataset}/{split}/{len(own):06d}"
                own.append(Sample(name, question.dataset, images, question.text, (question.answer,)))
        if all(len(own) == samples for own in found.values()):
            return found
    raise AssertionError("draw has no end")
