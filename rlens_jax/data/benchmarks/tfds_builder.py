"""The benchmarks as tensorflow-datasets, prepared once from VLMEvalKit's TSV files; no TensorFlow is needed.

    source = read_benchmark("MMStar", folder=Path("LMUData"), data_dir=Path("prepared"))
    for i in range(len(source)):
        instance = source[i]          # with its images, read from disk now

`Benchmarks` is a ShardBasedBuilder, which writes a shard as it reads it: tfds's GeneratorBasedBuilder collects up to 1 GB of
a split in memory and needs TensorFlow beyond that. Change `Benchmarks.VERSION` whenever the stored features change.
"""

import contextlib
import fcntl
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlens_jax.console import Progress
from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, Benchmark, Instance, all_instances, find_benchmark
from rlens_jax.data.benchmarks.tsv import TsvTable, scan
from rlens_jax.errors import UserError
from rlens_jax.mirrors import fetched

ROWS = "rows"
"""The only split: each file is one split of its benchmark."""
SHARD_BYTES = 64_000_000
"""Approximate size of a shard. tfds keeps the examples of the current shard in memory to count them."""
MEGABYTE = 1_000_000


class LocalInfo(tfds.core.DatasetInfo):
    """The description of a dataset that is not published."""

    def initialize_from_bucket(self) -> None:
        """Look for nothing: tfds makes a temporary folder for published facts first, and leaves it behind."""


class Benchmarks(tfds.core.ShardBasedBuilder):
    """The rows of a TSV file that have an image, in the file's order; `md5` is its MD5 sum (default: the published one)."""

    VERSION = tfds.core.Version("2.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put VLMEvalKit's NAME.tsv into the folder; VLMEvalKit itself downloads it to ~/LMUData when it evaluates."
    )
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in BENCHMARKS]  # noqa: RUF012 (tfds's way)

    def __init__(self, *, md5: str | None = None, **options: Any):
        super().__init__(**options)
        self._md5 = md5

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return LocalInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "index": text,
                    "question": text,
                    "answers": tfds.features.Sequence(text),
                    "options": tfds.features.Sequence({"letter": text, "text": text}),
                    "fields": tfds.features.Sequence({"name": text, "text": text}),
                    # Bytes, not images: load_image decodes them, within its limits.
                    "images": tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
                }
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        benchmark = BENCHMARKS[self.builder_config.name]
        table = read_table(benchmark, Path(dl_manager.manual_dir), self._md5)
        instances = all_instances(benchmark, table)
        kept = (*benchmark.needed, *benchmark.optional)
        self.info.metadata["indices"] = [row.index for row in table.rows]
        self.info.metadata["groups"] = [list(item.group) for item in instances]
        self.info.metadata["columns"] = [name for name in table.columns if name in kept]
        return {ROWS: [functools.partial(_examples, table, instances, rows) for rows in _shards(table)]}


def _examples(table: TsvTable, instances: Sequence[Instance], rows: range) -> Iterator[tuple[int, dict[str, Any]]]:
    """The examples of a shard."""
    for i in rows:
        item = instances[i]
        example = {
            "index": item.index,
            "question": item.question,
            "answers": list(item.answers),
            "options": [{"letter": letter, "text": text} for letter, text in item.options.items()],
            "fields": [{"name": name, "text": text} for name, text in item.fields.items()],
            "images": list(table.images(table.rows[i])),
        }
        yield i, example


def _shards(table: TsvTable) -> list[range]:
    """Ranges of consecutive rows with about SHARD_BYTES of image text each."""
    shards, first, size = [], 0, 0
    for i, row in enumerate(table.rows):
        size += row.image_bytes
        if size >= SHARD_BYTES or i == len(table.rows) - 1:
            shards.append(range(first, i + 1))
            first, size = i + 1, 0
    return shards


def read_table(benchmark: Benchmark, folder: Path, md5: str | None = None) -> TsvTable:
    """Scan the TSV file of a benchmark in a folder, with progress on the terminal.

    UserError if `scan` refuses the file, or if its MD5 sum is not `md5` (default: the published one).
    """
    path = fetched(folder / f"{benchmark.name}.tsv")
    _check_there(path)
    with Progress(f"reading {path.name}", math.ceil(path.stat().st_size / MEGABYTE), "MB") as shown:
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            shown.advance(math.ceil((done + num_bytes) / MEGABYTE) - math.ceil(done / MEGABYTE))
            done += num_bytes

        lower_case = benchmark.task == "choice"
        table = scan(path, benchmark.needed, benchmark.optional, advance, lower_case=lower_case)
    if md5 is None and table.md5 != benchmark.md5:
        raise UserError(
            f"{path}: the MD5 sum is {table.md5}, the published one {benchmark.md5}; download the file again, or use this "
            f"version with --md5 {benchmark.name}={table.md5}"
        )
    if md5 is not None and table.md5 != md5:
        raise UserError(f"{path}: the MD5 sum is {table.md5}, not {md5}; find that version of the file")
    return table


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {Benchmarks.MANUAL_DOWNLOAD_INSTRUCTIONS}")


class BenchmarkSource:
    """The prepared instances of a benchmark in the file's order, each read from disk on access."""

    def __init__(self, dataset: str, builder: Any):
        self.dataset = dataset
        self.indices: Sequence[str] = builder.info.metadata["indices"]
        """Column `index` of all instances."""
        self.groups: Sequence[Sequence[str]] = builder.info.metadata["groups"]
        """`Instance.group` of all instances."""
        self.columns: Sequence[str] = builder.info.metadata["columns"]
        """The file's columns, in its order, without the index, the images and those that nothing uses."""
        self._rows = builder.as_data_source(ROWS)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Instance]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Instance:
        row = self._rows[range(len(self))[i]]
        return Instance(
            dataset=self.dataset,
            index=row["index"].decode(),
            question=row["question"].decode(),
            answers=tuple(text.decode() for text in row["answers"]),
            options=_pairs(row["options"], "letter"),
            fields=_pairs(row["fields"], "name"),
            images=tuple(row["images"]),
        )


def _pairs(columns: Mapping[str, Sequence[bytes]], key: str) -> dict[str, str]:
    return {name.decode(): text.decode() for name, text in zip(columns[key], columns["text"], strict=True)}


def read_benchmark(dataset: str, folder: Path, data_dir: Path, md5: str | None = None) -> BenchmarkSource:
    """The instances of a benchmark, prepared in `data_dir` from `folder`/DATASET.tsv if necessary.

    Args:
        folder: folder of the TSV files; used only if the benchmark is not prepared yet.
        data_dir: folder of the prepared files, about 3/4 of the size of the TSV file.
        md5: MD5 sum that the TSV file must have; default: the published one.

    Raises:
        UserError: naming file, row and field of the first error in the file.
    """
    published = find_benchmark(dataset).md5
    # Another version of the file is another dataset.
    place = data_dir if md5 in (None, published) else data_dir / f"md5_{md5}"

    def make() -> Benchmarks:
        builder = Benchmarks(md5=md5, config=dataset, data_dir=os.fspath(place), file_format="array_record")
        if not Path(builder.data_path).exists():
            _check_there(fetched(folder / f"{dataset}.tsv"))
        return builder

    return BenchmarkSource(dataset, prepared(make, dataset, place, folder))


def prepared(make: Callable[[], Any], name: str, data_dir: Path, manual_dir: Path | None = None) -> Any:
    """A builder of a tensorflow-dataset whose files are on disk. Prepares them once, in one of several processes, if needed.

    While one process prepares, others wait. Files of a killed preparation are not used.

    Args:
        make: makes the builder, for files in `data_dir`.
        name: name of the dataset, for errors.
        manual_dir: folder of the files that the builder reads, if any.

    Raises:
        UserError: `data_dir` cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        builder = make()
        if Path(builder.data_path).exists():
            return builder
        # tfds writes to a temporary folder and renames it, which fails for the second of two processes. The
        # operating system drops the lock when the process that holds it ends.
        with open(data_dir / f".{builder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Made again: another process may have finished while this one waited.
            builder = make()
            for leftover in Path(builder.data_path).parent.glob("incomplete.*"):
                shutil.rmtree(leftover)
            tfds.disable_progress_bar()
            with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(None):
                # tfds prints a message about downloads and makes a folder for them, although nothing is downloaded.
                builder.download_and_prepare(
                    download_dir=downloads, download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
                )
    except OSError as error:
        raise UserError(f"{name} cannot be prepared in {data_dir}: {error}") from error
    return builder
