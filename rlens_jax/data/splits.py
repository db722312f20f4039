"""The samples of a run, split into validation (for the search) and test (for the held-out curves)."""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlens_jax.config import OWN_ANSWERS, PAGES, DataConfig, RunConfig
from rlens_jax.data.benchmarks.catalogue import Instance, Turn
from rlens_jax.data.benchmarks.mixture import mixture_samples
from rlens_jax.data.components import components
from rlens_jax.data.image_folder import SUFFIXES, read_image_folder
from rlens_jax.data.images import image_hash, image_size
from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.data.page_samples import read_pages
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.mirrors import fetched, fetched_folder, place
from rlens_jax.resources import cache_folder

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
    source = data.source
    if source is None:
        raise UserError(
            f"data.source is missing: name a .jsonl or .json file, a folder of images, or {PAGES!r}, the embedded model's data"
        )
    if source == PAGES:
        return _pages(data)
    if data.is_mixture:
        if data.benchmarks is None:
            raise UserError(f"data.benchmarks must name the folder of the TSV files of {source}")
        cache = Path(data.cache or cache_folder() / "data")
        return mixture_samples(fetched(place(source)), place(data.benchmarks), cache / "benchmarks", prompt)
    if source.endswith(".jsonl"):
        return split_samples(read_jsonl(place(source)), data, seed)
    folder = fetched_folder(place(source), lambda name: name.lower().endswith(SUFFIXES))
    if not folder.is_dir():
        raise UserError(f"data.source: {source!r} is neither {PAGES!r} nor a .jsonl or .json file nor a folder of images")
    return split_samples(read_image_folder(folder), data, seed)


def asked_samples(samples: Splits, config: RunConfig) -> Splits:
    """The samples whose own answers a run needs: the curves show right answers if there are any."""
    return {split: members for split, members in samples.items() if split == "validation" or not config.data.has_answers}


def with_own(samples: Splits, config: RunConfig, own: Mapping[str, tuple[int, ...]]) -> Splits:
    """The samples, those with one of the dense model's `own` answers with it. UserError if the objective needs other answers."""
    if not (config.data.has_answers or config.search.own_answers):
        raise UserError(
            f"data.source: the images of {config.data.source} have no answers, which search.objective {config.search.objective} "
            f"needs; set search.objective to one of {', '.join(OWN_ANSWERS)}, which compare with the dense model"
        )
    return {split: [replace(sample, own=own.get(sample.id)) for sample in members] for split, members in samples.items()}


def _pages(data: DataConfig) -> dict[str, list[Sample]]:
    """The embedded model's data: validation, test and, if wanted, the pages that follow those of the test."""
    held_out = read_pages("test", data.test_samples + data.confirmation_samples)
    by_dataset = {
        "validation": read_pages("validation", data.validation_samples),
        "test": {name: members[: data.test_samples] for name, members in held_out.items()},
    }
    splits = {split: list(itertools.chain(*members.values())) for split, members in by_dataset.items()}
    if data.confirmation_samples:
        seen = {image for sample in splits["test"] for image in sample.images}
        later = itertools.chain(*(members[data.test_samples :] for members in held_out.values()))
        splits["confirmation"] = [sample for sample in later if seen.isdisjoint(sample.images)]
    return splits


def split_samples(samples: Sequence[Sample], data: DataConfig, seed: int) -> Splits:
    """Split by the contents of image files, so that the search sees no held-out image under whatever name or in whatever dataset.

    Contents are equal if the files are, byte by byte: that is exact and cheap, and it finds copies and links. A picture that was
    encoded again is another image. Samples that share an image, directly or through others, stay together.

    Raises:
        UserError: an image cannot be read, or a dataset has too few images that are its own.
    """
    rng = np.random.default_rng(seed)
    contents = _contents(samples)
    groups: dict[str, dict[int, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    numbers = components([contents[image] for image in sample.images] for sample in samples)
    for sample, group in zip(samples, numbers, strict=True):
        groups[sample.dataset][group].append(sample)
    orders = {name: [list(members)[place] for place in rng.permutation(len(members))] for name, members in groups.items()}
    held_out = _held_out(orders, data)
    splits: dict[str, list[Sample]] = {"validation": [], "test": []}
    for name, order in orders.items():
        for split, limit in (("validation", data.validation_samples), ("test", data.test_samples)):
            chosen = [group for group in order if (group in held_out) == (split == "test")]
            splits[split] += [sample for group in chosen for sample in groups[name][group]][:limit]
    return splits


def _held_out(orders: Mapping[str, Sequence[int]], data: DataConfig) -> set[int]:
    """The groups to hold out: the first ones of each dataset's order, as far as another dataset did not decide already.

    Datasets with few groups choose first, since they have least choice.
    """
    decided: dict[int, bool] = {}
    for name in sorted(orders, key=lambda name: len(orders[name])):
        order = orders[name]
        if len(order) < 2:
            raise UserError(f"{data.source}: dataset {name!r} has one image; the search and the curves need one each")
        shared = [decided[group] for group in order if group in decided]
        free = [group for group in order if group not in decided]
        least, most = int(not any(shared)), len(free) - all(shared)
        if least > most:
            raise UserError(
                f"{data.source}: dataset {name!r} shares too many images with others to be split; leave one of them out"
            )
        wanted = min(max(1, round(data.held_out_share * len(order))), len(order) - 1) - sum(shared)
        decided |= {group: place < min(max(wanted, least), most) for place, group in enumerate(free)}
    return {group for group, held_out in decided.items() if held_out}


def _contents(samples: Sequence[Sample]) -> dict[bytes | Path, int | bytes]:
    """What is equal for equal contents, by image: the size of a file if no other has it, else its hash."""
    by_size: dict[int, dict[bytes | Path, Sample]] = defaultdict(dict)
    for sample in samples:
        for image in sample.images:
            by_size[image_size(image, sample.id)][image] = sample
    return {
        image: size if len(members) == 1 else image_hash(image, sample.id)
        for size, members in by_size.items()
        for image, sample in members.items()
    }


def samples_hash(splits: Splits) -> str:
    """SHA-256, in hex, of all that is in the samples of all splits."""
    digest = hashlib.sha256()
    hashes: dict[bytes | Path, bytes] = {}  # an image that many questions name is read once
    for split, samples in splits.items():
        for sample in samples:
            how = f"marked={sample.marked}, as_stored={sample.as_stored}"
            for text in (split, sample.id, sample.dataset, sample.question, *sample.answers, how + sample.conversation):
                digest.update(f"{len(text)}:{text}".encode())
            for image in sample.images:
                if image not in hashes:
                    hashes[image] = image_hash(image, sample.id)
                digest.update(hashes[image])
    return digest.hexdigest()
