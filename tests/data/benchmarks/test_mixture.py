"""The mixture: its draw, its file, and the samples that a ranking gets from it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rlens_jax.config import DataConfig
from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, PAPER_BENCHMARKS, Instance, Turn, instance
from rlens_jax.data.benchmarks.mixture import (
    DATASETS,
    Mixture,
    _apportioned,
    draw,
    main,
    mixture_samples,
    read_mixture,
    to_sample,
    write_mixture,
)
from rlens_jax.data.benchmarks.tsv import TsvTable, scan
from rlens_jax.data.splits import load_splits
from rlens_jax.errors import UserError
from tests.data.benchmarks.files import benchmark_rows, encoded, md5_of, picture, write_tsv
from tests.families.published import kind_of

IMAGES = {"OCRBench": 30, "MME": 24, "HallusionBench": 24}
SUMS = {"validation": {"MME": ["0", "1"]}, "test": {"MME": ["2", "3"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight benchmarks, of at least 36 questions each."""
    folder = tmp_path_factory.mktemp("tsv")
    for place, name in enumerate(PAPER_BENCHMARKS):
        write_tsv(folder / f"{name}.tsv", benchmark_rows(name, IMAGES.get(name, 18), first=100 * place))
    return folder


@pytest.fixture(scope="module")
def tables(folder: Path) -> dict[str, TsvTable]:
    return {name: scan(folder / f"{name}.tsv", BENCHMARKS[name].needed, BENCHMARKS[name].optional) for name in PAPER_BENCHMARKS}


@pytest.fixture(scope="module")
def mixture(tables: dict[str, TsvTable]) -> Mixture:
    return draw(tables, instances=96, held_out=64, seed=1)


def chosen(table: TsvTable, name: str, indices: Sequence[str]) -> list[Instance]:
    return [instance(BENCHMARKS[name], table, row) for row in table.rows if row.index in indices]


def test_datasets_are_those_with_answers() -> None:
    assert len(PAPER_BENCHMARKS) == 8
    assert len(DATASETS) == 21
    assert not {"DocVQA_TEST", "InfoVQA_TEST"} & set(DATASETS)


def test_numbers(mixture: Mixture) -> None:
    """Even over the datasets, to within half a group per stratum."""
    for split, number in ((mixture.validation, 12), (mixture.test, 8)):
        assert list(split) == list(PAPER_BENCHMARKS)
        for name, indices in split.items():
            within = 4 if name == "HallusionBench" else 3
            assert abs(len(indices) - number) <= within, name
            assert len(set(indices)) == len(indices)


def test_splits_share_neither_questions_nor_images(mixture: Mixture, tables: dict[str, TsvTable]) -> None:
    assert not shared_images(mixture, tables)


def shared_images(mixture: Mixture, tables: dict[str, TsvTable]) -> set[bytes]:
    """Hashes of the images in both splits."""
    images = {(name, row.index): row.image_hashes for name, table in tables.items() for row in table.rows}
    validation, test = (
        {image for name, indices in split.items() for index in indices for image in images[name, index]}
        for split in (mixture.validation, mixture.test)
    )
    return validation & test


def test_an_image_of_two_benchmarks_is_in_one_split(tmp_path: Path) -> None:
    """Also one of several images, and in base64 with and without line ends."""
    names, tables = ("DocVQA_VAL", "TextVQA_VAL"), {}
    for name in names:
        rows = benchmark_rows(name, images=12)
        for number, item in enumerate(rows):
            if name == "TextVQA_VAL" and number % 2 == 0:
                text = str(item["image"])
                item["image"] = str([text, encoded(picture(1000 + number))]) if number % 4 else f"{text[:76]}\n{text[76:]}\n"
        path = write_tsv(tmp_path / f"{name}.tsv", rows)
        tables[name] = scan(path, BENCHMARKS[name].needed, BENCHMARKS[name].optional)
    for seed in range(8):
        mixture = draw(tables, instances=8, held_out=16, seed=seed)
        assert not shared_images(mixture, tables)
        path = tmp_path / f"{seed}.json"
        write_mixture(replace(mixture, md5={name: table.md5 for name, table in tables.items()}), path)
        samples = mixture_samples(path, tmp_path, tmp_path / "cache", lambda item: Turn(item.question))
        assert all(sample.as_stored for members in samples.values() for sample in members)
    same = {"validation": {names[0]: ["0"], names[1]: ["8"]}, "test": {names[0]: ["2"], names[1]: ["1"]}}
    write_mixture(replace(mixture, **same), path)
    with pytest.raises(UserError, match=r"DocVQA_VAL/0 \(validation\) and TextVQA_VAL/1 \(test\) have the same image; draw"):
        mixture_samples(path, tmp_path, tmp_path / "cache", lambda item: Turn(item.question))


def test_an_image_is_drawn_with_all_its_questions(mixture: Mixture, tables: dict[str, TsvTable]) -> None:
    for name, table in tables.items():
        for split in (mixture.validation, mixture.test):
            drawn = {image for row in table.rows if row.index in split[name] for image in row.image_hashes}
            assert {row.index for row in table.rows if set(row.image_hashes) & drawn} == set(split[name]), name


def test_groups_are_whole(mixture: Mixture, tables: dict[str, TsvTable]) -> None:
    for name, size in (("MME", 2), ("HallusionBench", 4)):
        for split in (mixture.validation, mixture.test):
            groups = Counter(item.group for item in chosen(tables[name], name, split[name]))
            assert groups
            assert set(groups.values()) == {size}


def test_all_rotations_of_a_question_are_drawn(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["MMBench_DEV_EN"]
    rows = [row | {"image": encoded(picture(int(str(row["index"]))))} for row in benchmark_rows(benchmark.name, 12, questions=3)]
    table = scan(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows), benchmark.needed, benchmark.optional)
    drawn = draw({benchmark.name: table}, instances=9, held_out=9, seed=0)
    for split in (drawn.validation, drawn.test):
        questions = Counter(int(index) % 10**6 for index in split[benchmark.name])
        assert questions and set(questions.values()) == {3}


@pytest.mark.parametrize(("instances", "drawn"), [(10, 8), (12, 16), (2, 8)])
def test_a_group_that_does_not_fit_is_in_if_that_is_nearer(tables: dict[str, TsvTable], instances: int, drawn: int) -> None:
    """Two strata of groups of four: of 5 each one group is taken, of 6 two; but never none."""
    some = draw({"HallusionBench": tables["HallusionBench"]}, instances=instances, held_out=8, seed=0)
    assert len(some.validation["HallusionBench"]) == drawn


def test_strata_are_in_proportion(tables: dict[str, TsvTable]) -> None:
    """OCRBench has 3 kinds of 20 questions each; with a kind twice as frequent, its share doubles."""
    drawn = draw({"OCRBench": tables["OCRBench"]}, instances=18, held_out=12, seed=0)
    for split, each in ((drawn.validation, 6), (drawn.test, 4)):
        strata = Counter(item.stratum for item in chosen(tables["OCRBench"], "OCRBench", split["OCRBench"]))
        assert strata == {(f"kind {kind}",): each for kind in range(3)}
    table = tables["OCRBench"]
    rows = [replace(row, cells={**row.cells, "category": row.cells["category"].replace("2", "1")}) for row in table.rows]
    drawn = draw({"OCRBench": replace(table, rows=rows)}, instances=18, held_out=12, seed=0)
    items = chosen(replace(table, rows=rows), "OCRBench", drawn.validation["OCRBench"])
    assert Counter(item.stratum for item in items) == {("kind 0",): 6, ("kind 1",): 12}


def test_the_seed_decides_and_other_datasets_do_not(mixture: Mixture, tables: dict[str, TsvTable]) -> None:
    assert draw(tables, instances=96, held_out=64, seed=1) == mixture
    other = draw(tables, instances=96, held_out=64, seed=2)
    assert all(other.validation[name] != mixture.validation[name] for name in PAPER_BENCHMARKS)
    some = {name: tables[name] for name in ("MMStar", "MME")}
    assert draw(some, instances=24, held_out=16, seed=1).validation["MME"] == mixture.validation["MME"]


def test_indices_are_in_the_order_of_the_file(mixture: Mixture, tables: dict[str, TsvTable]) -> None:
    for name, indices in mixture.validation.items():
        assert [row.index for row in tables[name].rows if row.index in set(indices)] == indices
        assert len(indices) < len(tables[name].rows)
        assert indices != [row.index for row in tables[name].rows][: len(indices)]


def test_a_small_dataset_gives_half(tables: dict[str, TsvTable]) -> None:
    drawn = draw({"DocVQA_VAL": tables["DocVQA_VAL"]}, instances=1000, held_out=5, seed=0)
    assert len(drawn.validation["DocVQA_VAL"]) == 18
    assert len(drawn.test["DocVQA_VAL"]) in (4, 6)  # two questions about each image


def test_nothing_to_hold_out(tmp_path: Path, tables: dict[str, TsvTable]) -> None:
    rows = benchmark_rows("DocVQA_VAL", images=1, questions=4)
    table = scan(write_tsv(tmp_path / "DocVQA_VAL.tsv", rows), ("question", "answer"))
    with pytest.raises(UserError, match="too few rows: none are left for the test instances"):
        draw({"DocVQA_VAL": table}, instances=2, held_out=2, seed=0)
    with pytest.raises(UserError, match="5 instances for 8 datasets"):
        draw(tables, instances=5, held_out=8, seed=0)
    with pytest.raises(UserError, match="5 held-out instances for 8 datasets"):
        draw(tables, instances=8, held_out=5, seed=0)


def test_seats_by_largest_remainders() -> None:
    for sizes, count, seats in (
        ([10, 10, 10], 9, [3, 3, 3]),
        ([10, 20, 70], 10, [1, 2, 7]),
        ([1, 1, 8], 5, [1, 0, 4]),
        ([3, 3], 100, [3, 3]),
        ([5, 0], 2, [2, 0]),
    ):
        assert _apportioned(np.array(sizes), count).tolist() == seats


def test_the_file_holds_the_mixture(mixture: Mixture, tmp_path: Path) -> None:
    path = tmp_path / "new" / "mixture.json"
    write_mixture(mixture, path)
    assert read_mixture(path) == mixture
    fields = json.loads(path.read_text())
    assert set(fields) == {"format", "seed", "md5", "validation", "test"}
    assert fields["validation"]["MME"] == mixture.validation["MME"]
    assert [file.name for file in path.parent.iterdir()] == ["mixture.json"]


def by_hand(path: Path, **changes: object) -> Path:
    fields = {"format": "rlens_jax mixture 1", "seed": 0, "md5": {"MME": "0" * 32}, **SUMS, **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "other"}, "field 'format' must be 'rlens_jax mixture 1'; is this a mixture?"),
        ({"sede": 1}, "unknown field 'sede' (did you mean 'seed'?)"),
        ({"test": None}, "field 'test' is missing"),
        ({"seed": "1"}, "field 'seed' must be a whole number"),
        ({"validation": {}}, "field 'validation' must name at least one dataset"),
        ({"validation": {"MMEE": ["1"]}}, "field 'validation': unknown benchmark 'MMEE' (did you mean 'MME'?)"),
        ({"test": {"MMStar": ["7"]}}, "fields 'md5' and 'test' must name the same datasets"),
        ({"md5": {"MME": "12"}}, "field 'md5': MME must have 32 hexadecimal digits"),
        ({"test": {"MME": []}}, "field 'test', MME: must be a list of at least one index"),
        ({"test": {"MME": [7]}}, "field 'test', MME: 7 must be a text, as in the column `index`"),
        ({"test": {"MME": ["7", "1"]}}, "field 'test', MME: index '1' is in 'validation' already"),
        ({"test": {"MME": ["7", "7"]}}, "field 'test', MME: index '7' is in 'test' already"),
    ],
)
def test_a_file_that_is_not_right(tmp_path: Path, changes: Mapping[str, object], complaint: str) -> None:
    path = by_hand(tmp_path / "m.json", **changes)
    with pytest.raises(UserError) as caught:
        read_mixture(path)
    assert str(caught.value) == f"{path}: {complaint}"


def test_no_such_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*m\.json: No such file"):
        read_mixture(tmp_path / "m.json")
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_mixture(tmp_path / "m.json")


def test_the_samples_of_a_ranking(tmp_path: Path) -> None:
    """Loads a file written by hand as a ranking run does."""
    sums = {name: md5_of(write_tsv(tmp_path / f"{name}.tsv", benchmark_rows(name, images=2))) for name in ("MME", "OCRBench")}
    validation, test = {"OCRBench": ["1"], "MME": ["0", "1"]}, {"OCRBench": ["3"], "MME": ["2", "3"]}
    path = by_hand(tmp_path / "m.json", md5=sums, validation=validation, test=test)

    def load(model_type: str, step_by_step: bool) -> Mapping[str, Sequence[object]]:
        data = DataConfig(str(path), str(tmp_path), 1, 1, cache=str(tmp_path / "cache"))
        return load_splits(data, partial(kind_of(model_type).benchmark_prompt, step_by_step=step_by_step), seed=0)

    samples = load("internvl_chat", False)
    assert {split: [sample.id for sample in members] for split, members in samples.items()} == {
        "validation": ["MME/0", "MME/1", "OCRBench/1"],
        "test": ["MME/2", "MME/3", "OCRBench/3"],
    }
    pair, text = samples["test"][1:]
    assert (pair.dataset, pair.images, pair.answers) == ("MME", (picture(1),), ("Yes",))
    assert pair.question == "Question 3? Answer the question using a single word or phrase."
    assert (text.dataset, text.images, text.answers) == ("OCRBench", (picture(1),), ("a", "b"))
    assert load("minicpmv", True)["test"][2].question.startswith("Read the following question carefully")
    assert load("minicpmv", False)["test"][2].question.startswith("Answer the question using")
    by_hand(path, md5=sums, validation=validation, test={**test, "MME": ["2", "9"]})
    with pytest.raises(UserError, match=r"m\.json: field 'test': MME has no row with index '9' and an image"):
        mixture_samples(path, tmp_path, tmp_path / "cache" / "benchmarks", kind_of("qwen2_vl").benchmark_prompt)


def test_empty_answers_are_no_answers() -> None:
    item = Instance("TextVQA_VAL", "1", "q", ("a", "", "b", "a", " "), {}, {}, (b"i",))
    assert to_sample(item, kind_of("qwen2_vl").benchmark_prompt).answers == ("a", "b")
    with pytest.raises(UserError, match="TextVQA_VAL/1: no answer"):
        to_sample(replace(item, answers=("",)), kind_of("qwen2_vl").benchmark_prompt)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other versions of the TSV files need --md5; `draw` does the rest."""
    output = tmp_path / "mixture.json"
    options = ["--data", str(folder), "--output", str(output), "--instances", "24", "--held-out", "16", "--seed", "3"]
    options += ["--datasets", "MME,MMStar"]
    with pytest.raises(UserError, match=r"MME\.tsv: the MD5 sum is .* or use this version with --md5 MME="):
        main(options)
    sums = {name: md5_of(folder / f"{name}.tsv") for name in ("MME", "MMStar")}
    main([*options, *(f"--md5={name}={md5}" for name, md5 in sums.items())])
    written = read_mixture(output)
    assert (written.seed, written.md5) == (3, sums)
    assert len(written.validation["MMStar"]) == 12
    said = capsys.readouterr()
    held_out = sum(map(len, written.test.values()))
    assert said.out == f"{output}: 24 instances for the search, {held_out} held out\n"
    assert abs(held_out - 16) <= 3
    assert "MME: 12 (about 6 images) for the search, 8 (about 4 images) held out" in said.err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--datasets", "MEM"], "unknown benchmark 'MEM' (did you mean 'MME'?)"),
        (["--datasets", "DocVQA_TEST"], "the answers of DocVQA_TEST are withheld, so a ranking cannot use it"),
        (["--md5", "MME"], "--md5 MME must be NAME=SUM with 32 hexadecimal digits"),
        (["--md5", f"Other={'0' * 32}"], "unknown benchmark 'Other'"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--instances", "many"], "argument --instances: invalid int value: 'many'"),
        (["--sede", "1"], "unknown option --sede (did you mean '--seed'?)"),
        ([], "MME.tsv: no such file"),
    ],
)
def test_options_that_are_not_right(tmp_path: Path, options: list[str], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        main(["--data", str(tmp_path), "--output", str(tmp_path / "m.json"), "--datasets", "MME", *options])
    assert complaint in str(caught.value)
    assert not (tmp_path / "m.json").exists()


def test_a_mixture_is_never_overwritten(folder: Path, tmp_path: Path) -> None:
    path = by_hand(tmp_path / "m.json")
    with pytest.raises(UserError, match=r"m\.json exists already"):
        main(["--data", str(folder), "--output", str(path)])
