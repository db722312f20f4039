"""Five rows of each benchmark from its TSV file to a score and a file of predictions, without a model."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlens_jax.data.benchmarks.catalogue import BENCHMARKS
from rlens_jax.data.benchmarks.tfds_builder import read_benchmark
from rlens_jax.data.images import load_images
from rlens_jax.errors import UserError
from rlens_jax.evaluation.answers import write_predictions
from rlens_jax.evaluation.datasets import Benchmark
from tests.data.benchmarks.files import benchmark_rows, encoded, five_rows, md5_of, picture, write_tsv
from tests.families.published import kind_of

Open = Callable[..., Benchmark]
NEW = tuple(BENCHMARKS)[10:]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens rows as a dataset of a benchmark."""

    def make(name: str, rows: Sequence[dict[str, object]], limit: int | None = None, rules: str = "2026-08") -> Benchmark:
        path = write_tsv(tmp_path / f"{name}.tsv", rows)
        source = read_benchmark(name, tmp_path, tmp_path / "prepared", md5_of(path))
        return Benchmark(source, md5_of(path), kind_of("qwen2_5_vl"), limit, rules)

    return make


@pytest.mark.parametrize("name", NEW)
def test_from_a_file_to_a_score_and_predictions(name: str, opened: Open, tmp_path: Path) -> None:
    rows, answer = five_rows(name), BENCHMARKS[name].answer_column
    dataset = opened(name, rows)
    assert dataset.indices == [row["index"] for row in rows]
    sample = dataset.sample(4)
    assert sample.images and str(rows[4]["question"]) in sample.question
    right = ["a" if BENCHMARKS[name].answers == "list" else str(row[answer]) for row in rows]
    assert dataset.score(right).value == pytest.approx(400 / 9 if name == "VizWiz" else 100)  # two people of three agree
    assert dataset.score([None] * 5).value == 0
    path = tmp_path / "predictions" / "it.tsv"
    write_predictions(path, dataset, [*right[:4], None])
    with path.open(newline="") as file:
        written = list(csv.DictReader(file, delimiter="\t"))
    for row, line, said in zip(rows, written, [*right[:4], ""], strict=True):
        assert line == {key: str(text) for key, text in row.items() if key != "image"} | {"prediction": said} | none_of(row)


def none_of(row: dict[str, object]) -> dict[str, str]:
    """Missing values are written as such."""
    return {key: "" for key, text in row.items() if text == "None"}


def test_predictions_are_read_back_as_from_the_file(opened: Open) -> None:
    """What pandas takes for missing is the text "nan", on both sides, and a column of numbers is one of numbers."""
    rows = benchmark_rows("GQA_TestDev_Balanced", images=5, questions=1)
    for row, text in zip(rows, ("None", "left", "7", "7.0", "nan."), strict=True):
        row["answer"] = text
    dataset = opened("GQA_TestDev_Balanced", rows)
    assert dataset.score(["", "left", "7", "7.0", "nan."]).per_sample == (1, 1, 1, 1, 1)
    assert dataset.score(["N/A", "None", "null", None, "nan"]).per_sample == (1, 0, 0, 0, 0)
    assert dataset.score(["None", "", "7", "7", "8"]).per_sample == (1, 0, 0, 1, 0)  # 7.0, as others are missing
    assert dataset.score(["x", "", "7", "7", "8"]).per_sample == (0, 0, 1, 0, 0)


def test_a_limit_takes_whole_questions_of_rotations(opened: Open) -> None:
    rows = five_rows("MMBench_DEV_EN")
    rows = [rows[place] for place in (0, 3, 1, 2, 4)]  # as in the published file, first rotations come first
    rows[0]["image"] = rows[2]["image"] = rows[3]["image"] = encoded(picture(0))
    for limit, indices in (
        (3, ["0", "1000000", "2000000"]),
        (4, ["0", "1000000", "2000000"]),
        (5, [row["index"] for row in rows]),
    ):
        assert opened("MMBench_DEV_EN", rows, limit).indices == indices
    with pytest.raises(UserError, match="MMBench_DEV_EN: no rows to score"):
        opened("MMBench_DEV_EN", rows, 2).score([])
    dataset = opened("MMBench_DEV_EN", rows, 4)
    assert [dataset.columns(place)["index"] for place in range(3)] == ["0", "1000000", "2000000"]


def test_open_questions_keep_their_answer(opened: Open) -> None:
    """A text that looks like a list is written as it stands, and is one option."""
    rows = benchmark_rows("MMMU_DEV_VAL", images=5, questions=1)
    rows[0] |= dict.fromkeys("ABCD", "") | {"answer": "['24', '24.0']"}
    dataset = opened("MMMU_DEV_VAL", rows)
    assert dataset.columns(0)["answer"] == "['24', '24.0']"
    assert dataset.score(["24", *"BBBB"]).per_sample == (0, 1, 1, 1, 1)
    assert dataset.score(["['24', '24.0']", *"BBBB"]).value == 100


def test_recompressed_images(opened: Open, tmp_path: Path) -> None:
    """As Pillow saves a JPEG of the pixels, without transparency."""
    rows = benchmark_rows("POPE", images=5, questions=1)
    transparent, file = Image.new("RGBA", (40, 30), (10, 20, 30, 0)), io.BytesIO()
    transparent.save(file, "png")
    rows[0]["image"] = encoded(file.getvalue())
    opened("POPE", rows)
    source = read_benchmark("POPE", tmp_path, tmp_path / "prepared", md5_of(tmp_path / "POPE.tsv"))
    dataset = Benchmark(source, "0" * 32, kind_of("qwen2_5_vl"), None, recompress=True)
    assert dataset.digest.endswith(", images recompressed")
    for place, pixels in ((0, transparent.convert("RGB")), (1, Image.open(io.BytesIO(picture(1))))):
        pixels.save(tmp_path / "it.jpg", quality=75, subsampling="4:2:0")
        sample = dataset.sample(place)
        assert sample.images == ((tmp_path / "it.jpg").read_bytes(),)
        (read,) = load_images(sample, "white")
        assert np.array_equal(np.asarray(read), np.asarray(Image.open(tmp_path / "it.jpg")))


def test_rules_of_2025(opened: Open) -> None:
    rows = benchmark_rows("RealWorldQA", images=5, questions=1)
    said = ["I think it is B because of its colour"] * 5
    assert [opened("RealWorldQA", rows, rules=rules).score(said).value for rules in ("2026-08", "2025-01")] == [0, 100]
