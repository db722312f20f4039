"""The pages of `data.pages` as three tensorflow-datasets, generated on first use; no TensorFlow is needed.

    samples = read_pages("pages_read", "validation", Path("data"), limit=100)

The prepared files (array_record) take about 130 MB and 20 seconds. Change `Pages.VERSION` whenever pages or questions
change: prepared data of the same version are used again.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from rlens_jax.data.benchmarks.tfds_builder import LocalInfo, prepared
from rlens_jax.data.pages import DATASETS, SPLITS, Page, Question, Split, make_page, make_question
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError, suggest

SAMPLES: dict[Split, int] = {"train": 2000, "validation": 150, "test": 300}
"""Samples per split, in each of the three datasets."""


def draw(dataset: str, split: Split, count: int) -> Iterator[tuple[Page, Question]]:
    """The pages and questions of a split, the same in every call. Exactly half of the yes/no answers are yes."""
    rng = np.random.default_rng([DATASETS.index(dataset), SPLITS.index(split)])
    for yes in rng.permutation(np.arange(count) % 2 == 0):
        page = make_page(rng, split, augment=False)
        question = make_question(rng, page, dataset)
        while dataset == "pages_yesno" and (question.answer == "yes") != yes:
            question = make_question(rng, page, dataset)
        yield page, question


class Pages(tfds.core.GeneratorBasedBuilder):
    """One question about a page of handwritten digits per sample. The splits use different digits."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=dataset) for dataset in DATASETS]  # noqa: RUF012 (tfds's way)

    def _info(self) -> tfds.core.DatasetInfo:
        return LocalInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "question": tfds.features.Text(),
                    "answer": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,  # the samples are random already
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
        dataset = self.builder_config.name
        for index, (page, question) in enumerate(draw(dataset, split, SAMPLES[split])):
            png = io.BytesIO()
            Image.fromarray(page.pixels).save(png, "png")
            png.seek(0)
            # `png` is a file of encoded bytes: encoding an array would import TensorFlow.
            texts = {"id": f"{dataset}/{split}/{index:06d}", "question": question.text, "answer": question.answer}
            yield index, {**texts, "image": png}


def read_pages(dataset: str, split: str, data_dir: Path, limit: int | None = None) -> list[Sample]:
    """The first `limit` samples (all by default) of a dataset's split, prepared in `data_dir` if needed.

    The images are PNG bytes. Several processes may call this at the same time: one prepares, the others wait. After a
    killed preparation the next one starts again.

    Raises:
        UserError: an unknown dataset or split, a limit below 1, or a folder that cannot be written.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown pages dataset {dataset!r}{suggest(dataset, DATASETS)}; known: {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{suggest(split, SPLITS)}; known: {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UserError(f"{dataset}: limit must be at least 1, not {limit}")
    builder = prepared(lambda: Pages(config=dataset, data_dir=os.fspath(data_dir), file_format="array_record"), dataset, data_dir)
    rows = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return [
        Sample(
            id=row["id"].decode(),
            dataset=dataset,
            images=(row["image"],),
            question=row["question"].decode(),
            answers=(row["answer"].decode(),),
        )
        for row in (rows[index] for index in range(len(rows) if limit is None else min(limit, len(rows))))
    ]
