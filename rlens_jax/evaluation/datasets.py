"""Datasets for an evaluation: questions in a fixed order, the columns of their file of predictions, and a score."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from rlens_jax.config import PAGES
from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, L2_CATEGORIES, find_benchmark
from rlens_jax.data.benchmarks.tfds_builder import BenchmarkSource, read_benchmark
from rlens_jax.data.benchmarks.tsv import as_read
from rlens_jax.data.images import recompressed
from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.data.page_samples import TEST_SAMPLES, read_pages
from rlens_jax.data.samples import Sample, normalised
from rlens_jax.data.splits import samples_hash
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.files import quoted
from rlens_jax.metrics.score import CURRENT, Row, Score, mean_ratio
from rlens_jax.metrics.scorers import score
from rlens_jax.mirrors import place

EXACT_MATCH = "exact match with any reference answer, rlens_jax"
"""The scoring rule of datasets that are not benchmarks; answers are compared as `data.samples.normalised` returns them."""

MAX_NAME_BYTES = 200
"""Of a dataset's name: with an ending and a temporary file's letters it is a file name, of at most 255 bytes."""


@runtime_checkable
class Dataset(Protocol):
    """Questions of one dataset."""

    name: str
    """Name of the dataset and of its file of predictions."""
    digest: str
    """Hash of the questions, their images and their order."""
    indices: Sequence[str]
    """The questions' indices in files of predictions."""
    scored: bool
    """Whether the reference answers are known."""

    def sample(self, place: int) -> Sample:
        """A question with its images."""

    def columns(self, place: int) -> Mapping[str, str]:
        """A question's columns in a file of predictions, `index` first; all questions have the same columns."""

    def score(self, predictions: Sequence[str | None]) -> Score:
        """The score of one prediction per question; None is wrong. UserError if these questions have no score."""


class Benchmark:
    """A benchmark of VLMEvalKit, scored by its rules.

    Args:
        source: its prepared instances.
        md5: MD5 sum of its TSV file.
        kind: the model, which selects the prompts.
        limit: use at most this many rows, the first ones; of a circular benchmark, those of the first whole questions.
        rules: a key of `metrics.score.RULES`.
        recompress: whether images are compressed as JPEG before a model sees them.
    """

    def __init__(
        self,
        source: BenchmarkSource,
        md5: str,
        kind: ModelKind,
        limit: int | None,
        rules: str = CURRENT,
        *,
        recompress: bool = False,
    ):
        self.name = source.dataset
        self.digest = f"md5 {md5}, prompts for {kind.model_type}{', images recompressed' if recompress else ''}"
        self._recompress = recompress
        self._benchmark = BENCHMARKS[self.name]
        self._places = _first(source, self._benchmark.circular, limit)
        self.indices: Sequence[str] = [source.indices[place] for place in self._places]
        self.scored = self._benchmark.answers != "none"
        self._source, self._kind, self._rules = source, kind, rules

    def sample(self, place: int) -> Sample:
        item = self._source[self._places[place]]
        if self._recompress:
            item = replace(item, images=tuple(recompressed(image, f"{item.id}: image") for image in item.images))
        return self._kind.benchmark_prompt(item).sample(item, ())

    def columns(self, place: int) -> Mapping[str, str]:
        item, column = self._source[self._places[place]], self._benchmark.answer_column
        cells = {**item.options, **item.fields, "question": item.question}
        if self.scored:
            # One reference stays as it stands: MMMU has texts that look like lists.
            lists = self._benchmark.answers == "list" or len(item.answers) > 1
            cells[column] = str(list(item.answers)) if lists else item.answers[0]
        return {"index": item.index, **{name: cells.get(name, "") for name in self._source.columns}}

    def score(self, predictions: Sequence[str | None]) -> Score:
        """As of the file of predictions, which VLMEvalKit reads with pandas: an empty prediction is the text "nan"."""
        texts = as_read([text or "" for text in predictions])
        rows = [self._row(place, text) for place, text in enumerate(texts)]
        unanswered = {row.index for row, text in zip(rows, predictions, strict=True) if text is None}
        return score(self.name, rows, unanswered, self._rules)

    def _row(self, place: int, prediction: str) -> Row:
        item = self._source[self._places[place]]
        l2_category = next((item.fields[name] for name in L2_CATEGORIES if name in item.fields), None)
        return Row(
            index=item.index,
            prediction=prediction,
            answers=item.answers,
            category=item.fields.get("category"),
            l2_category=l2_category,
            split=item.fields.get("split"),
            image=item.fields.get("image_path"),
            options=item.options,
            g_index=item.fields.get("g_index"),
        )


def _first(source: BenchmarkSource, circular: bool, limit: int | None) -> Sequence[int]:
    """Places of at most `limit` rows, the first ones; of whole groups if `circular`."""
    places = range(len(source.indices))
    if limit is None or not circular:
        return places[:limit]
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for row in places:
        groups[tuple(source.groups[row])].append(row)
    chosen: list[int] = []
    for members in groups.values():
        if len(chosen) + len(members) > limit:
            break
        chosen += members
    return sorted(chosen)


class ExactMatch:
    """Samples that are scored by comparing the texts of answers."""

    def __init__(self, name: str, samples: Sequence[Sample]):
        self.name = name
        self.digest = samples_hash({"test": samples})
        self.indices: Sequence[str] = [sample.id for sample in samples]
        self.scored = True
        self._samples = samples

    def sample(self, place: int) -> Sample:
        return self._samples[place]

    def columns(self, place: int) -> Mapping[str, str]:
        sample = self._samples[place]
        return {"index": sample.id, "question": sample.question, "answer": str(list(sample.answers))}

    def score(self, predictions: Sequence[str | None]) -> Score:
        pairs = zip(predictions, self._samples, strict=True)
        right = [float(text is not None and normalised(text) in sample.answers) for text, sample in pairs]
        return Score(
            ratios=(mean_ratio(100, self.indices, right),),
            breakdown={},
            groups=tuple(self.indices),
            strata=("",) * len(right),
            dataset=self.name,
            value=mean_ratio(100, self.indices, right).value,
            unit="%",
            per_sample=tuple(right),
            harness=EXACT_MATCH,
        )


def load_datasets(
    sources: Sequence[str],
    cache: Path,
    *,
    kind: ModelKind,
    limit: int | None,
    md5: Mapping[str, str],
    rules: str = CURRENT,
    recompress: bool = False,
) -> list[Dataset]:
    """The datasets of all sources, in order.

    Args:
        sources: each is `pages` (the embedded model's data), the path of a VLMEvalKit TSV file, or the path of a JSONL file.
        cache: folder of prepared datasets.
        kind: the model, which selects the prompts of benchmarks.
        limit: use at most this many questions of each dataset, the first ones.
        md5: MD5 sums of TSV files that are not the published ones, by dataset.
        rules: the rules of benchmarks, a key of `metrics.score.RULES`.
        recompress: whether images of benchmarks are compressed as JPEG first.

    Raises:
        UserError: a source cannot be read, two datasets have the same name, or a sum belongs to no source.
    """
    opened = partial(Benchmark, kind=kind, limit=limit, rules=rules, recompress=recompress)
    datasets = list(itertools.chain(*(_load(source, cache, limit, md5, opened) for source in sources)))
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--data names the dataset {quoted(name)} twice")
        if "/" in name or name.startswith(".") or not name.isprintable():
            raise UserError(
                f"dataset {quoted(name)}: the name of a file of predictions must not begin with a dot or contain a / or "
                "a control character"
            )
        if len(name.encode()) > MAX_NAME_BYTES:
            raise UserError(
                f"dataset {quoted(name)}: the name of a file of predictions has at most {MAX_NAME_BYTES} bytes, "
                f"this one {len(name.encode())}"
            )
    for name in md5:
        if name not in names:
            raise UserError(f"--md5 is for {name!r}, which is not among the data: {', '.join(names)}")
    return datasets


def _load(
    source: str, cache: Path, limit: int | None, md5: Mapping[str, str], opened: Callable[[BenchmarkSource, str], Benchmark]
) -> list[Dataset]:
    if source == PAGES:
        pages = read_pages("test", min(limit or TEST_SAMPLES, TEST_SAMPLES))
        return [ExactMatch(name, samples) for name, samples in pages.items()]
    path = place(source)
    if path.suffix == ".tsv":
        benchmark = find_benchmark(path.stem)
        known = md5.get(benchmark.name)
        read = read_benchmark(benchmark.name, path.parent, cache / "benchmarks", known)
        return [opened(read, known or benchmark.md5)]
    if path.suffix == ".jsonl":
        by_dataset: dict[str, list[Sample]] = defaultdict(list)
        for sample in read_jsonl(path):
            by_dataset[sample.dataset].append(sample)
        return [ExactMatch(name, samples[:limit]) for name, samples in by_dataset.items()]
    raise UserError(f"--data {source}: is neither {PAGES!r} nor a .tsv or .jsonl file")
