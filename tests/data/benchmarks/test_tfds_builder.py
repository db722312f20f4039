"""The benchmarks as tensorflow-datasets: stored fields, checks of rows, MD5 sums, shards, and no TensorFlow."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlens_jax.data.benchmarks import tfds_builder
from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, LETTERS, REFUSED, find_benchmark
from rlens_jax.data.benchmarks.tfds_builder import BenchmarkSource, read_benchmark
from rlens_jax.errors import UserError
from tests.data.benchmarks.files import benchmark_rows, encoded, md5_of, picture, write_tsv


def read(tmp_path: Path, dataset: str, rows: Sequence[dict[str, object]]) -> BenchmarkSource:
    path = write_tsv(tmp_path / f"{dataset}.tsv", rows)
    return read_benchmark(dataset, tmp_path, tmp_path / "prepared", md5_of(path))


def refusal(tmp_path: Path, dataset: str, rows: Sequence[dict[str, object]]) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, dataset, rows)
    assert not list((tmp_path / "prepared").rglob("*array_record*"))
    return str(caught.value).removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_every_benchmark(tmp_path: Path, dataset: str) -> None:
    rows = benchmark_rows(dataset, images=2)
    source = read(tmp_path, dataset, rows)
    indices = [row["index"] for row in rows]
    assert [item.index for item in source] == source.indices == indices
    assert [item.images for item in source] == [(picture(i),) for i in (0, 0, 1, 1)]
    item, first = source[-1], rows[-1]
    answers = {"list": ("a", "b", "a"), "none": ()}
    assert item.answers == answers.get(BENCHMARKS[dataset].answers, (first.get("answer"),))
    assert (item.dataset, item.question, item.id) == (dataset, "Question 3?", f"{dataset}/{indices[-1]}")
    own = {*LETTERS, "index", "question", "answer", "answers", "image"}
    assert item.fields == {name: text for name, text in first.items() if name not in own and text}
    # "None" is a missing value to pandas.
    options = {"A": "red", "B": "blue", "C": "green"} if BENCHMARKS[dataset].task == "choice" else {}
    options = {"A": "red", "B": "blue"} if BENCHMARKS[dataset].circular else options
    assert (item.options, list(item.options)) == (options, list(options))
    assert list(source.columns) == [name for name in first if name not in ("index", "image")]
    assert [tuple(group) for group in source.groups] == [item.group for item in source]
    with pytest.raises(IndexError):
        source[4]


def test_what_belongs_together(tmp_path: Path) -> None:
    mme = list(read(tmp_path, "MME", benchmark_rows("MME", images=3)))
    assert [item.group for item in mme[::2]] == [("OCR", "0.jpg"), ("count", "0.jpg"), ("OCR", "1.jpg")]
    assert [item.group for item in mme[::2]] == [item.group for item in mme[1::2]]
    hallusion = list(read(tmp_path, "HallusionBench", benchmark_rows("HallusionBench", images=4)))
    assert [item.group for item in hallusion] == [("VD chart", "0")] * 4 + [("VS chart", "1")] * 4
    assert hallusion[0].stratum == ("VD", "VD chart")
    chart = list(read(tmp_path, "ChartQA_TEST", benchmark_rows("ChartQA_TEST", images=2)))
    assert len({item.group for item in chart}) == 4
    assert [item.stratum for item in chart] == [("test_human",)] * 2 + [("test_augmented",)] * 2
    rows = benchmark_rows("MMBench_DEV_EN", images=2, questions=3)
    assert [item.group for item in read(tmp_path, "MMBench_DEV_EN", rows)] == [("0",)] * 3 + [("1",)] * 3
    grouped = [row | {"index": str(7 + number), "g_index": "7" if number < 3 else "10"} for number, row in enumerate(rows)]
    grouped = [row | {"image": rows[0]["image"]} for row in grouped]
    assert [item.group for item in read(tmp_path, "MMBench_DEV_EN", grouped)] == [("7",)] * 3 + [("10",)] * 3


@pytest.mark.parametrize(
    ("dataset", "text", "answers"),
    [
        ("DocVQA_VAL", "['a', \"it's\", 3, 0.5]", ("a", "it's", "3", "0.5")),
        ("DocVQA_VAL", "plain", ("plain",)),
        ("OCRBench", r"['\frac{1}{2}', '\\pi']", ("\frac{1}{2}", r"\pi")),
        ("OCRBench", r"['\sum']", (r"\sum",)),
        ("ChartQA_TEST", "[Yes, No]", ("[Yes, No]",)),
        ("ChartQA_TEST", "[1, 2]", ("1", "2")),
        ("ChartQA_TEST", "0.50", ("0.50",)),
        ("ChartQA_TEST", "None", ("nan",)),
        ("GQA_TestDev_Balanced", "['a', 'b']", ("a", "b")),
        ("VizWiz", "['a', 'b']", ("a", "b")),
        ("MMMU_DEV_VAL", "['24', '24.0']", ("['24', '24.0']",)),
        ("MMMU_DEV_VAL", "3.50", ("3.50",)),  # the answer of the other row is a letter
    ],
)
def test_answers(tmp_path: Path, dataset: str, text: str, answers: tuple[str, ...]) -> None:
    rows = benchmark_rows(dataset, images=1)
    rows[0][BENCHMARKS[dataset].answer_column] = text
    assert read(tmp_path, dataset, rows)[0].answers == answers


@pytest.mark.parametrize(
    ("dataset", "changes", "complaint"),
    [
        ("DocVQA_VAL", {"answer": "['a', 'b'"}, "field 'answer': \"['a', 'b'\" begins like a Python list but is not one"),
        ("DocVQA_VAL", {"answer": "[['a']]"}, "field 'answer': \"[['a']]\" must be a list of texts"),
        ("DocVQA_VAL", {"answer": "['a'], 'b'"}, "field 'answer': \"['a'], 'b'\" must be a list of texts"),
        ("DocVQA_VAL", {"answer": "[]"}, "field 'answer': an empty list of answers"),
        ("ChartQA_TEST", {"answer": ""}, "field 'answer': missing"),
        ("MME", {"question": ""}, "field 'question': missing"),
        ("MME", {"category": "NA"}, "field 'category': missing"),
        ("MMStar", dict.fromkeys("ABCD", "None"), "field 'A': no option has a text"),
        ("AI2D_TEST", dict.fromkeys("ABCD", ""), "field 'A': no option has a text"),
        ("POPE", {"category": ""}, "field 'category': missing"),
        ("VizWiz", {"answers": "['a'"}, "field 'answers': \"['a'\" begins like a Python list but is not one"),
        (
            "MMBench_DEV_EN",
            {"index": "1000001.0"},
            "field 'index': must be a whole number, which tells the rotations of a question",
        ),
        (
            "HallusionBench",
            {"index": "VD_chart_0_0_0"},
            "field 'index': must have six parts joined by _, the last three of them the ids of set, figure and question",
        ),
    ],
)
def test_a_row_that_is_not_right(tmp_path: Path, dataset: str, changes: dict[str, object], complaint: str) -> None:
    rows = benchmark_rows(dataset, images=2, questions=1)
    rows[1] |= changes
    assert refusal(tmp_path, dataset, rows) == f"{dataset}.tsv: row 2 (index {str(rows[1]['index'])!r}), {complaint}"


@pytest.mark.parametrize(
    ("dataset", "lacking", "given", "complaint"),
    [
        ("MMStar", "C", None, "column 'C' is missing"),
        ("VizWiz", "answers", "answer", "column 'answers' is missing (did you mean 'answer'?)"),
        ("POPE", "category", "Category", "column 'category' is missing (did you mean 'Category'?)"),
        ("MMBench_DEV_EN", "l2-category", "l2_category", "column 'l2-category' is missing (did you mean 'l2_category'?)"),
        ("ScienceQA_TEST", "hint", None, "column 'hint' is missing"),
        ("MMMU_DEV_VAL", "I", None, "column 'I' is missing"),
    ],
)
def test_columns_of_another_version(tmp_path: Path, dataset: str, lacking: str, given: str | None, complaint: str) -> None:
    rows = [
        {given if name == lacking else name: text for name, text in row.items() if given or name != lacking}
        for row in benchmark_rows(dataset, images=2)
    ]
    assert refusal(tmp_path, dataset, rows).startswith(f"{dataset}.tsv: {complaint}")


def test_multiple_choice_knows_no_capitals_in_names_of_columns(tmp_path: Path) -> None:
    rows = [
        {name if len(name) == 1 else name.title(): text for name, text in row.items()}
        for row in benchmark_rows("MMBench_DEV_EN", images=1)
    ]
    assert read(tmp_path, "MMBench_DEV_EN", rows)[1].fields == {"category": "kind 0", "l2-category": "fine", "split": "dev"}


def test_open_questions_are_of_mmmu_only(tmp_path: Path) -> None:
    rows = [row | dict.fromkeys("ABCD", "") for row in benchmark_rows("MMMU_DEV_VAL", images=1)]
    assert read(tmp_path, "MMMU_DEV_VAL", rows)[0].options == {}


def test_an_option_in_a_column_of_numbers(tmp_path: Path) -> None:
    """Few questions have a fifth option: if all of these are numbers, pandas makes them numbers, and missing ones floats."""
    rows = benchmark_rows("ScienceQA_TEST", images=3, questions=1)
    rows[1]["E"] = "10"
    assert [item.options.get("E") for item in read(tmp_path, "ScienceQA_TEST", rows)] == [None, "10.0", None]


@pytest.mark.parametrize(
    ("dropped", "complaint"),
    [
        (2000001, "question 1 has 2 of its 3 rotations (rows 1, 1000001)"),
        (1000001, "question 1 has 2 of its 3 rotations (rows 1, 2000001)"),
        (1, "question 1 has 2 of its 3 rotations (rows 1000001, 2000001)"),
    ],
)
def test_a_missing_rotation(tmp_path: Path, dropped: int, complaint: str) -> None:
    rows = [row | {"image": encoded(picture(0))} for row in benchmark_rows("MMBench_DEV_EN_V11", images=2, questions=3)]
    message = refusal(tmp_path, "MMBench_DEV_EN_V11", [row for row in rows if row["index"] != str(dropped)])
    assert message == f"MMBench_DEV_EN_V11.tsv: {complaint}; a question of a circular benchmark needs all"


@pytest.mark.parametrize("name", ["MMVet", "MMVet_Hard", "VQAv2_TEST", "vqav2"])
def test_benchmarks_that_are_left_out_are_named_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} cannot be scored here: only (a judge model|the benchmark's server)"):
        find_benchmark(name)
    assert not set(REFUSED) & set(BENCHMARKS)


def test_damage_found_late_leaves_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Images are checked while the shards are written."""
    rows = benchmark_rows("MME", images=3)
    rows[4]["image"] = encoded(picture(0)[:200])[:-1]
    assert refusal(tmp_path, "MME", rows).startswith("MME.tsv: row 5 (index '4'), field 'image': not base64")
    assert not list(tmp_path.rglob("*incomplete*"))
    rows[4]["image"] = encoded(picture(9))
    assert read(tmp_path, "MME", rows)[4].images == (picture(9),)
    assert all(line.startswith("reading MME.tsv: ") for line in capfd.readouterr().err.splitlines())


def test_md5_sums(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "MME.tsv", benchmark_rows("MME", images=1))
    md5, published = md5_of(path), "b36b43c3f09801f5d368627fb92187c3"
    with pytest.raises(UserError) as caught:
        read_benchmark("MME", tmp_path, tmp_path / "prepared")
    assert str(caught.value) == (
        f"{path}: the MD5 sum is {md5}, the published one {published}; download the file again, or use this "
        f"version with --md5 MME={md5}"
    )
    with pytest.raises(UserError, match=f"the MD5 sum is {md5}, not {'0' * 32}; find that version"):
        read_benchmark("MME", tmp_path, tmp_path / "prepared", "0" * 32)


def test_prepared_data_are_of_one_version_of_a_file(tmp_path: Path) -> None:
    """A prepared benchmark needs its TSV file no longer. Another version of the file is another dataset."""
    path = write_tsv(tmp_path / "MME.tsv", benchmark_rows("MME", images=1))
    first = md5_of(path)
    assert len(read_benchmark("MME", tmp_path, tmp_path / "prepared", first)) == 2
    second = md5_of(write_tsv(path, benchmark_rows("MME", images=2)))
    assert len(read_benchmark("MME", tmp_path, tmp_path / "prepared", second)) == 4
    path.unlink()
    assert len(read_benchmark("MME", tmp_path, tmp_path / "prepared", first)) == 2
    assert len(read_benchmark("MME", tmp_path, tmp_path / "prepared", second)) == 4
    with pytest.raises(UserError, match=r"MME\.tsv: no such file; Put VLMEvalKit's NAME\.tsv into the folder"):
        read_benchmark("MME", tmp_path, tmp_path / "prepared")


def test_published_sums() -> None:
    """Guards against typing errors: the first digits of the sums in VLMEvalKit's DATASET_MD5."""
    assert {name: benchmark.md5[:6] for name, benchmark in BENCHMARKS.items()} == {
        "OCRBench": "e953d9",
        "DocVQA_VAL": "d5ee77",
        "DocVQA_TEST": "6a2f28",
        "InfoVQA_VAL": "2342e9",
        "InfoVQA_TEST": "df535b",
        "ChartQA_TEST": "c902e0",
        "TextVQA_VAL": "b233b3",
        "MME": "b36b43",
        "MMStar": "e1ecd2",
        "HallusionBench": "0c23ac",
        "POPE": "c12f5a",
        "GQA_TestDev_Balanced": "99b62f",
        "MMBench_DEV_EN": "b6caf1",
        "MMBench_DEV_EN_V11": "30c05b",
        "MMBench_TEST_EN_V11": "8d1a70",
        "ScienceQA_VAL": "96320d",
        "ScienceQA_TEST": "e42e9e",
        "VizWiz": "fa4ac4",
        "SEEDBench_IMG": "680172",
        "MMMU_DEV_VAL": "585e8a",
        "AI2D_TEST": "0f593e",
        "AI2D_TEST_NO_MASK": "fd8f46",
        "RealWorldQA": "4de008",
    }
    assert {len(benchmark.md5) for benchmark in BENCHMARKS.values()} == {32}
    with pytest.raises(UserError, match=r"unknown benchmark 'MMStars' \(did you mean 'MMStar'\?\)"):
        find_benchmark("MMStars")


def test_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = benchmark_rows("MME", images=5)
    monkeypatch.setattr(tfds_builder, "SHARD_BYTES", len(str(rows[0]["image"])) * 3)
    source = read(tmp_path, "MME", rows)
    assert len(list(tmp_path.rglob("*array_record-*-of-00004"))) == 4
    assert [item.index for item in source] == [str(i) for i in range(10)]
    assert [item.images for item in source] == [(picture(i // 2),) for i in range(10)]


PROGRAM = """
import os, signal, sys
from pathlib import Path
from rlens_jax.data.benchmarks import tfds_builder

folder = Path(sys.argv[1])
if sys.argv[3] == "killed":
    tfds_builder._examples = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
assert len(tfds_builder.read_benchmark("MME", folder, folder / "data", sys.argv[2])) == 2
assert not {"tensorflow", "torch", "jax", "pandas"} & set(sys.modules)
"""


def test_preparations_side_by_side_and_one_that_was_killed(tmp_path: Path) -> None:
    """What the killed one left is not taken for data, one of two others prepares, and neither TensorFlow nor JAX is imported."""
    path = write_tsv(tmp_path / "MME.tsv", benchmark_rows("MME", images=1))

    def start(kind: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), md5_of(path), kind]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = start("killed")
    killed.communicate()
    assert killed.returncode == -9
    assert list(tmp_path.rglob("incomplete.*"))
    said = []
    for process in [start("whole"), start("whole")]:
        out, errors = process.communicate()
        assert (process.returncode, out) == (0, "")
        said += [line.split(":")[0] for line in errors.splitlines()]
    assert said == ["reading MME.tsv"] * 2  # by one of them
    assert not list(tmp_path.rglob("incomplete.*"))
