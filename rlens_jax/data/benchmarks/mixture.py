"""The validation mixture: a file with the instances of the benchmarks on which a ranking is searched and tested.

    python -m rlens_jax.data.benchmarks.mixture --data FOLDER --output mixture.json

FOLDER contains VLMEvalKit's TSV files. About --instances questions (the paper: 2350) are drawn for the search, and about
--held-out questions for the curves, about images that the search does not see. Each benchmark gets the same share, stratified
by category. Images are drawn, each with all its questions in the benchmark: 2 in MME and ChartQA, about 4 in DocVQA and 6 in
InfoVQA; the command says how many. Pairs of MME and sets of HallusionBench stay whole. The same files, seed and options draw
the same instances.

The file is JSON in the order of the TSV files, so that other programs can use the same instances:

    {"format": "rlens_jax mixture 1", "seed": 0,
     "md5": {"MME": "b36b43c3f09801f5d368627fb92187c3", ...},         of the TSV files
     "validation": {"MME": ["0", "1", ...], ...},                     column `index` of the TSV files
     "test": {"MME": ["8", "9", ...], ...}}

In PyTorch, with VLMEvalKit:

    mixture = json.load(open("mixture.json"))
    data = build_dataset("MME").data
    data = data[data["index"].astype(str).isin(mixture["validation"]["MME"])]
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlens_jax import mirrors
from rlens_jax.console import ArgumentParser, run_command, say, show
from rlens_jax.data.benchmarks.catalogue import (
    BENCHMARKS,
    PAPER_BENCHMARKS,
    Instance,
    Turn,
    all_instances,
    find_benchmark,
    named_sum,
)
from rlens_jax.data.benchmarks.tfds_builder import read_benchmark, read_table
from rlens_jax.data.benchmarks.tsv import TsvTable
from rlens_jax.data.components import components
from rlens_jax.data.images import image_hash
from rlens_jax.data.samples import Sample, normalised
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import json_text, read_json, replace_file

FORMAT = "rlens_jax mixture 1"
DATASETS = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.answers != "none")
"""Benchmarks that a mixture may have: those with public answers."""
INSTANCES = 2350
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Mixture:
    """Instances per dataset, as indices in the order of the TSV files."""

    seed: int
    md5: Mapping[str, str]
    validation: Mapping[str, Sequence[str]]
    test: Mapping[str, Sequence[str]]


def draw(tables: Mapping[str, TsvTable], *, instances: int, held_out: int, seed: int) -> Mixture:
    """Draw a mixture.

    Every benchmark gives the same number of instances, but at most half of its own to each split. Strata are drawn in
    proportion to their size. All questions about an image, and all members of a group (`Instance.group`), are drawn together, so
    a number may be off by about half as many per stratum. No held-out instance shares an image with a validation instance, of
    whatever benchmark.

    Raises:
        UserError: a row is wrong for its benchmark, there are fewer instances than datasets, or no instance can be held out.
    """
    for name, number in (("instances", instances), ("held-out instances", held_out)):
        if number < len(tables):
            raise UserError(f"{number} {name} for {len(tables)} datasets: each dataset needs at least one")
    rngs = {name: np.random.default_rng([seed, list(BENCHMARKS).index(name)]) for name in tables}
    items = {name: all_instances(BENCHMARKS[name], table) for name, table in tables.items()}
    images = {name: {row.index: set(row.image_hashes) for row in table.rows} for name, table in tables.items()}
    splits: dict[str, dict[str, list[str]]] = {name: {} for name in SPLITS}
    seen: set[bytes] = set()
    for split, total in zip(SPLITS, (instances, held_out), strict=True):
        taken: set[bytes] = set()
        for name, table in tables.items():
            groups: dict[int, list[Instance]] = defaultdict(list)
            together = components([item.group, *images[name][item.index]] for item in items[name])
            for item, number in zip(items[name], together, strict=True):
                groups[number].append(item)
            free = [group for group in groups.values() if not any(images[name][item.index] & seen for item in group)]
            drawn = _stratified(free, min(round(total / len(tables)), len(items[name]) // 2), rngs[name])
            if not drawn:
                raise UserError(f"{table.path}: too few rows: none are left for the {split} instances")
            splits[split][name] = [item.index for item in items[name] if item.index in drawn]
            taken.update(*(images[name][index] for index in drawn))
        seen = taken
    return Mixture(seed, {name: table.md5 for name, table in tables.items()}, **splits)


def _stratified(groups: Sequence[Sequence[Instance]], count: int, rng: np.random.Generator) -> set[str]:
    """Indices of about `count` instances in whole groups, from the strata (of the first instance) in proportion."""
    strata: dict[tuple[str, ...], list[Sequence[Instance]]] = defaultdict(list)
    for group in groups:
        strata[group[0].stratum].append(group)
    sizes = np.array([sum(map(len, members)) for members in strata.values()])
    drawn: set[str] = set()
    for members, quota in zip(strata.values(), _apportioned(sizes, count), strict=True):
        taken = 0
        for place in rng.permutation(len(members)):
            group = members[place]
            # The group that crosses the quota is drawn if that brings the number nearer to it.
            if taken + len(group) / 2 <= quota or (quota and not taken):
                drawn.update(item.index for item in group)
                taken += len(group)
    return drawn


def _apportioned(sizes: np.ndarray, count: int) -> np.ndarray:
    """Shares of `count` for strata of these sizes by largest remainders, at most their sizes."""
    shares = sizes * (min(count, sizes.sum()) / max(1, sizes.sum()))
    seats = np.floor(shares).astype(int)
    rest = round(shares.sum()) - int(seats.sum())
    seats[np.argsort(seats - shares, kind="stable")[:rest]] += 1
    return seats


def _counted(table: TsvTable, indices: Sequence[str]) -> str:
    """How many questions there are, and about how many images."""
    chosen = set(indices)
    images = {image for row in table.rows if row.index in chosen for image in row.image_hashes}
    return f"{len(chosen)} (about {len(images)} images)"


def write_mixture(mixture: Mixture, path: Path) -> None:
    """Write the file and its folder. UserError when they cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    replace_file(path, json_text({"format": FORMAT, **asdict(mixture)}).encode())


def read_mixture(path: Path) -> Mixture:
    """Read a mixture file, made by this command or by hand. UserError, naming file and field, if it is not a `Mixture`."""
    fields = read_json(path)
    known = ("format", "seed", "md5", *SPLITS)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise UserError(f"{path}: field 'format' must be {FORMAT!r}; is this a mixture?")
    for name in fields:
        if name not in known:
            raise UserError(f"{path}: unknown field {name!r}{suggest(name, known)}")
    for name in known:
        if name not in fields:
            raise UserError(f"{path}: field {name!r} is missing")
    if not isinstance(fields["seed"], int):
        raise UserError(f"{path}: field 'seed' must be a whole number")
    for name in ("md5", *SPLITS):
        if not isinstance(fields[name], dict) or not fields[name]:
            raise UserError(f"{path}: field {name!r} must name at least one dataset")
        for dataset in fields[name]:
            if dataset not in BENCHMARKS:
                raise UserError(f"{path}: field {name!r}: unknown benchmark {dataset!r}{suggest(dataset, BENCHMARKS)}")
        if set(fields[name]) != set(fields["md5"]):
            raise UserError(f"{path}: fields 'md5' and {name!r} must name the same datasets")
    for dataset, md5 in fields["md5"].items():
        if not isinstance(md5, str) or len(md5) != 32:
            raise UserError(f"{path}: field 'md5': {dataset} must have 32 hexadecimal digits")
    _check_indices(fields, path)
    del fields["format"]
    return Mixture(**fields)


def _check_indices(fields: Mapping[str, Any], path: Path) -> None:
    seen: dict[tuple[str, str], str] = {}
    for split in SPLITS:
        for dataset, indices in fields[split].items():
            where = f"{path}: field {split!r}, {dataset}"
            if not isinstance(indices, list) or not indices:
                raise UserError(f"{where}: must be a list of at least one index")
            for index in indices:
                if not isinstance(index, str):
                    raise UserError(f"{where}: {index!r} must be a text, as in the column `index`")
                if (dataset, index) in seen:
                    raise UserError(f"{where}: index {index!r} is in {seen[dataset, index]!r} already")
                seen[dataset, index] = split


def mixture_samples(path: Path, folder: Path, data_dir: Path, prompt: Callable[[Instance], Turn]) -> dict[str, list[Sample]]:
    """The samples that a mixture file lists, by split.

    Args:
        folder: folder of the TSV files, for benchmarks that are not prepared yet.
        data_dir: folder of the prepared files.
        prompt: makes the user's turn of a question, as the family of the model does.

    Raises:
        UserError: the mixture or a TSV file is wrong, an index does not exist, an instance has no answer, or an image is in both
            splits.
    """
    mixture = read_mixture(path)
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for dataset, md5 in mixture.md5.items():
        source = read_benchmark(dataset, folder, data_dir, md5)
        place = {index: i for i, index in enumerate(source.indices)}
        for split in SPLITS:
            for index in getattr(mixture, split)[dataset]:
                if index not in place:
                    raise UserError(f"{path}: field {split!r}: {dataset} has no row with index {index!r} and an image")
                samples[split].append(to_sample(source[place[index]], prompt))
    first = {image_hash(image, sample.id): sample.id for sample in samples["validation"] for image in sample.images}
    for sample in samples["test"]:
        for image in sample.images:
            if (known := first.get(image_hash(image, sample.id))) is not None:
                raise UserError(
                    f"{path}: {known} (validation) and {sample.id} (test) have the same image; draw the mixture again"
                )
    return samples


def to_sample(item: Instance, prompt: Callable[[Instance], Turn]) -> Sample:
    """An instance as a sample: the family's prompt, and its distinct answers, `normalised`, that are not empty."""
    answers = tuple(dict.fromkeys(text for answer in item.answers if (text := normalised(answer))))
    if not answers:
        raise UserError(f"{item.id}: no answer; the answers of {item.dataset} are withheld or empty")
    return prompt(item).sample(item, answers)


def main(arguments: Sequence[str]) -> None:
    """Parse, draw, write."""
    parser = ArgumentParser(prog="python -m rlens_jax.data.benchmarks.mixture", description=__doc__)
    parser.add_argument("--data", type=mirrors.place, required=True, metavar="FOLDER", help="folder of VLMEvalKit's TSV files")
    parser.add_argument("--output", type=mirrors.place, required=True, metavar="FILE.json", help="the file to write")
    parser.add_argument(
        "--datasets",
        type=lambda text: text.split(","),
        default=PAPER_BENCHMARKS,
        metavar="LIST",
        help=f"benchmarks among {','.join(DATASETS)} (default: the paper's, the first {len(PAPER_BENCHMARKS)})",
    )
    parser.add_argument(
        "--instances", type=int, default=INSTANCES, metavar="N", help="number of instances for the search (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out", type=int, default=INSTANCES, metavar="N", help="number of instances for the curves (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: %(default)s)")
    parser.add_argument(
        "--md5",
        action="append",
        default=[],
        metavar="NAME=SUM",
        help="MD5 sum of a version of NAME.tsv other than the published one; may be repeated",
    )
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed {options.seed} must be at least 0")
    if mirrors.exists(options.output):
        parser.error(f"{options.output} exists already")
    sums = dict(named_sum(text, parser.error) for text in options.md5)
    for name in (*options.datasets, *sums):
        if name not in DATASETS:
            find_benchmark(name)
            parser.error(f"the answers of {name} are withheld, so a ranking cannot use it")
    tables = {name: read_table(BENCHMARKS[name], options.data, sums.get(name)) for name in dict.fromkeys(options.datasets)}
    mixture = draw(tables, instances=options.instances, held_out=options.held_out, seed=options.seed)
    write_mixture(mixture, options.output)
    for name, table in tables.items():
        say(f"{name}: {_counted(table, mixture.validation[name])} for the search, {_counted(table, mixture.test[name])} held out")
    numbers = [sum(map(len, getattr(mixture, split).values())) for split in SPLITS]
    show(f"{options.output}: {numbers[0]} instances for the search, {numbers[1]} held out")


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; nothing was written")
