"""The validation mixture: which instances of the benchmarks a ranking is searched and tested on, listed in a file.

    python -m rlens_jax.data.benchmarks.mixture --data FOLDER --output mixture.json

FOLDER has VLMEvalKit's TSV files. About --instances questions (the paper: 2350) are drawn evenly over the benchmarks, stratified
by category, the pairs of MME and the sets of HallusionBench whole; and as many again, held out, about images that none of the
first are about. The same files, seed and options draw the same instances.

The file is JSON, sorted as the TSV files are, so that any program can use the very same instances:

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlens_jax.console import ArgumentParser, run_command, say
from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, Instance, find_benchmark, instance, named_sum
from rlens_jax.data.benchmarks.prompts import prompt
from rlens_jax.data.benchmarks.tfds_builder import read_benchmark, read_table
from rlens_jax.data.benchmarks.tsv import TsvTable
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import json_text, read_json, replace_file

FORMAT = "rlens_jax mixture 1"
DATASETS = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.answers != "none")
"""What a mixture is drawn from by default: the benchmarks whose answers are public."""
INSTANCES = 2350
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Mixture:
    """Instances by dataset, as indices in the order of the TSV files."""

    seed: int
    md5: Mapping[str, str]
    validation: Mapping[str, Sequence[str]]
    test: Mapping[str, Sequence[str]]


def draw(tables: Mapping[str, TsvTable], *, instances: int, held_out: int, seed: int) -> Mixture:
    """Draw a mixture.

    A benchmark gives the same number of instances as the others, but in each split at most half of what it has. Within it,
    strata are drawn in proportion to their size, groups (`Instance.group`) whole; so numbers are met to about half a group a
    stratum. No held-out instance has an image that a validation instance has.

    Raises UserError for a row that is not what its benchmark has, for fewer instances than datasets, and when no instance can
    be held out.
    """
    for name, number in (("instances", instances), ("held-out instances", held_out)):
        if number < len(tables):
            raise UserError(f"{number} {name} of {len(tables)} datasets: at least one of each is needed")
    splits: dict[str, dict[str, list[str]]] = {name: {} for name in SPLITS}
    for name, table in tables.items():
        rng = np.random.default_rng([seed, list(BENCHMARKS).index(name)])
        rows = {row.index: row for row in table.rows}
        items = [instance(BENCHMARKS[name], table, row) for row in table.rows]
        counts = (round(total / len(tables)) for total in (instances, held_out))
        seen: set[bytes] = set()
        for split, count in zip(SPLITS, counts, strict=True):
            groups: dict[tuple[str, ...], list[Instance]] = defaultdict(list)
            for item in items:
                groups[item.group].append(item)
            free = [
                group for group in groups.values() if not any(rows[item.index].image_hash in seen for item in group)
            ]
            drawn = _stratified(free, min(count, len(items) // 2), rng)
            if not drawn:
                raise UserError(f"{table.path}: too few rows: none is left for the {split} instances")
            splits[split][name] = [item.index for item in items if item.index in drawn]
            seen = {rows[index].image_hash for index in drawn}
    return Mixture(seed, {name: table.md5 for name, table in tables.items()}, **splits)


def _stratified(groups: Sequence[Sequence[Instance]], count: int, rng: np.random.Generator) -> set[str]:
    """Indices of about `count` instances in whole groups, from each stratum (of a group's first) in proportion."""
    strata: dict[tuple[str, ...], list[Sequence[Instance]]] = defaultdict(list)
    for group in groups:
        strata[group[0].stratum].append(group)
    sizes = np.array([sum(map(len, members)) for members in strata.values()])
    drawn: set[str] = set()
    for members, quota in zip(strata.values(), _apportioned(sizes, count), strict=True):
        taken = 0
        for place in rng.permutation(len(members)):
            group = members[place]
            # The group that crosses the quota counts if that brings the number nearer to it.
            if taken + len(group) / 2 <= quota or (quota and not taken):
                drawn.update(item.index for item in group)
                taken += len(group)
    return drawn


def _apportioned(sizes: np.ndarray, count: int) -> np.ndarray:
    """`count` seats for strata of these sizes by largest remainders; no more than there are."""
    shares = sizes * (min(count, sizes.sum()) / max(1, sizes.sum()))
    seats = np.floor(shares).astype(int)
    rest = round(shares.sum()) - int(seats.sum())
    seats[np.argsort(seats - shares, kind="stable")[:rest]] += 1
    return seats


def write_mixture(mixture: Mixture, path: Path) -> None:
    """Write the file and its folder. UserError when they cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    replace_file(path, json_text({"format": FORMAT, **asdict(mixture)}).encode())


def read_mixture(path: Path) -> Mixture:
    """Read a mixture file, made by this command or by hand.

    Raises:
        UserError: naming file and field, for whatever differs from `Mixture` and the docstring of this module.
    """
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
                    raise UserError(f"{where}: {index!r} must be a text, as the column `index` has it")
                if (dataset, index) in seen:
                    raise UserError(f"{where}: index {index!r} is in {seen[dataset, index]!r} already")
                seen[dataset, index] = split


def mixture_samples(
    path: Path, folder: Path, data_dir: Path, *, family: str, step_by_step: bool
) -> dict[str, list[Sample]]:
    """The samples that a mixture lists, by split, with the questions that VLMEvalKit asks a model of this family.

    Args:
        path: of the mixture.
        folder: of the TSV files; looked at for benchmarks that are not prepared yet.
        data_dir: of the prepared files.
        family: `model_type` of the model's config.json.
        step_by_step: see `prompts.prompt`.

    Raises UserError for a mixture or TSV files that are not right, an index that the file does not have, and an instance
    without an answer.
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
                samples[split].append(to_sample(source[place[index]], family=family, step_by_step=step_by_step))
    return samples


def to_sample(item: Instance, *, family: str, step_by_step: bool) -> Sample:
    """An instance as a ranking takes it: the family's prompt, and each different answer that is not empty once."""
    answers = tuple(dict.fromkeys(answer for answer in item.answers if answer.strip()))
    if not answers:
        raise UserError(f"{item.id}: no answer; the answers of {item.dataset} are withheld or empty")
    question = prompt(family, item, step_by_step=step_by_step)
    return Sample(item.id, item.dataset, item.images, question, answers)


def main(arguments: Sequence[str]) -> None:
    """Parse, draw, write."""
    parser = ArgumentParser(prog="python -m rlens_jax.data.benchmarks.mixture", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of VLMEvalKit's TSV files")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="the file to make")
    parser.add_argument(
        "--datasets",
        type=lambda text: text.split(","),
        default=DATASETS,
        metavar="LIST",
        help=f"of {','.join(DATASETS)} (default: all)",
    )
    parser.add_argument(
        "--instances", type=int, default=INSTANCES, metavar="N", help="for the search (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out", type=int, default=INSTANCES, metavar="N", help="for the curves (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument(
        "--md5",
        action="append",
        default=[],
        metavar="NAME=SUM",
        help="use a version of NAME.tsv that is not the published one; can be given several times",
    )
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed {options.seed} must be at least 0")
    if options.output.exists():
        parser.error(f"{options.output} exists already")
    sums = dict(named_sum(text, parser.error) for text in options.md5)
    for name in (*options.datasets, *sums):
        if name not in DATASETS:
            find_benchmark(name)
            parser.error(f"the answers of {name} are withheld, so a ranking cannot use it")
    tables = {
        name: read_table(BENCHMARKS[name], options.data, sums.get(name)) for name in dict.fromkeys(options.datasets)
    }
    mixture = draw(tables, instances=options.instances, held_out=options.held_out, seed=options.seed)
    write_mixture(mixture, options.output)
    for name in tables:
        say(f"{name}: {len(mixture.validation[name])} for the search, {len(mixture.test[name])} held out")
    numbers = [sum(map(len, getattr(mixture, split).values())) for split in SPLITS]
    print(f"{options.output}: {numbers[0]} instances for the search, {numbers[1]} held out")


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; nothing was written")
