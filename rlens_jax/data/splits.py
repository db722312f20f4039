"""The samples of a run, split into validation (for the search) and test (for the held-out curves)."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rlens_jax.config import DataConfig
from rlens_jax.data.benchmarks.catalogue import Instance, Turn
from rlens_jax.data.benchmarks.mixture import mixture_samples
from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.data.pages import DATASETS
from rlens_jax.data.pages_tfds import read_pages
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.resources import cache_folder

PAGES = "pages"
"""The data source of the embedded model."""

Splits = Mapping[str, Sequence[Sample]]


def load_splits(data: DataConfig, prompt: Callable[[Instance], Turn], *, seed: int) -> Splits:
    """Load the samples of both splits.

    Args:
        data: the source. A mixture of benchmarks lists its samples; the numbers of samples do not apply to it.
        prompt: makes the user's turn of a benchmark question, as the family of the model does.
        seed: seed of a JSONL file's split.

    Raises:
        UserError: the source cannot be read, or leaves a split without samples.
    """
    source, cache = data.source, Path(data.cache or cache_folder() / "data")
    if source == PAGES:
        limits = {"validation": data.validation_samples, "test": data.test_samples}
        return {
            split: [sample for name in DATASETS for sample in read_pages(name, split, cache / "pages", limit)]
            for split, limit in limits.items()
        }
    if source.endswith(".json"):
        if data.benchmarks is None:
            raise UserError(f"data.benchmarks must name the folder of the TSV files of {source}")
        return mixture_samples(Path(source), Path(data.benchmarks), cache / "benchmarks", prompt)
    if not source.endswith(".jsonl"):
        raise UserError(f"data.source: {source!r} is neither {PAGES!r} nor a .jsonl or .json file")
    return split_samples(read_jsonl(Path(source)), data, seed)


def split_samples(samples: Sequence[Sample], data: DataConfig, seed: int) -> Splits:
    """Split by images, so that the search sees no held-out image. UserError if a dataset has only one image."""
    rng = np.random.default_rng(seed)
    splits: dict[str, list[Sample]] = {"validation": [], "test": []}
    for dataset in dict.fromkeys(sample.dataset for sample in samples):
        by_images: dict[tuple[bytes | Path, ...], list[Sample]] = defaultdict(list)
        for sample in samples:
            if sample.dataset == dataset:
                by_images[sample.images].append(sample)
        groups = list(by_images.values())
        order = rng.permutation(len(groups))
        num_test = min(max(1, round(data.held_out_share * len(groups))), len(groups) - 1)
        if num_test < 1:
            raise UserError(f"{data.source}: dataset {dataset!r} has one image; the search and the curves need one each")
        drawn = {"test": order[:num_test], "validation": order[num_test:]}
        for split, limit in (("validation", data.validation_samples), ("test", data.test_samples)):
            splits[split] += [sample for group in drawn[split] for sample in groups[group]][:limit]
    return splits


def samples_hash(splits: Splits) -> str:
    """SHA-256, in hex, of all texts and images of the samples of all splits."""
    digest = hashlib.sha256()
    for split, samples in splits.items():
        for sample in samples:
            for text in (split, sample.id, sample.dataset, sample.question, *sample.answers):
                digest.update(f"{len(text)}:{text}".encode())
            for image in sample.images:
                content = image if isinstance(image, bytes) else _read(image, sample.id)
                digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _read(image: Path, sample_id: str) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise UserError(f"{sample_id}: image {image} cannot be read ({error.strerror})") from None
