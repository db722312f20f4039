"""Sizes of rows and images, of the table of benchmarks and of a user's data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.config import ComputeConfig, DataConfig, RunConfig
from rlens_jax.data.images import image_dimensions
from rlens_jax.dry_run.data_sizes import Question, Row, data_sizes, rows_of
from rlens_jax.files import read_json_object
from rlens_jax.resources import benchmark_sizes, embedded_model

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
EIGHT = {"OCRBench", "DocVQA_VAL", "InfoVQA_VAL", "ChartQA_TEST", "TextVQA_VAL", "MME", "MMStar", "HallusionBench"}


def test_the_table_says_of_every_number_where_it_is_from() -> None:
    table = read_json_object(benchmark_sizes())["benchmarks"]
    assert set(table) == EIGHT
    for entry in table.values():
        assert set(entry) - {"sources"} == set(entry["sources"])
        assert all(min(size) > 0 for size in entry["image_sizes"])


def of_table(folder: Path, **data: Any) -> dict[str, tuple[Row, ...]]:
    config = RunConfig(data=DataConfig(validation_samples=294, test_samples=40, **data))
    return dict(data_sizes(config, read_model_kind(folder), folder).rows)


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir()))
def test_eight_benchmarks_for_every_family(name: str) -> None:
    found = of_table(MODELS / name)
    for rows, most in ((found["validation"], 294), (found["test"], 40)):
        assert {row.dataset for row in rows} == EIGHT
        for dataset in EIGHT:
            assert sum(row.samples for row in rows if row.dataset == dataset) == most
    pages = [row for row in found["validation"] if row.dataset == "DocVQA_VAL"]
    assert len(pages) == pytest.approx(294 / 4.2, abs=1.5)
    assert all(row.size[0] + row.size[1] <= row.alone for row in pages)


def test_vlmevalkits_limits_enlarge_small_images() -> None:
    visual = [row.size[1] for row in of_table(MODELS / "qwen2_vl_7b")["validation"] if row.dataset != "OCRBench"]
    assert min(visual) >= 1280


def test_rows_without_data_say_why() -> None:
    kind = read_model_kind(MODELS / "qwen2_vl_7b")
    sources = [
        data_sizes(RunConfig(data=DataConfig(source)), kind, MODELS / "qwen2_vl_7b").source for source in (None, "no.jsonl")
    ]
    assert sources == [
        "configs/benchmark_sizes.json, because data.source is open",
        "configs/benchmark_sizes.json, because no.jsonl does not exist",
    ]


def test_rows_of_questions_by_hand() -> None:
    questions = [Question(5, 10, (2, 3)), Question(5, 10, (2,)), Question(5, 30, (1, 2))]
    shared = rows_of("d", 20, [(80,)], questions, shared=True)
    # Each answer comes with its question, unless the question is alone in its row.
    assert shared == [
        Row("d", (5 + 25 + 12, 20), ((80,),), 2, 3, 3 * 35 + 2 + 3 + 2),
        Row("d", (5 + 30 + 3, 20), (), 1, 2, 2 * 55 + 3),
    ]
    alone = rows_of("d", 20, [(80,)], questions, shared=False)
    assert [row.size for row in alone] == [(17, 20), (18, 20), (17, 20), (36, 20), (37, 20)]
    assert [row.images for row in alone] == [((80,),), (), (), (), ()]


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    """Eight images with two questions each, and two answers to the first."""
    lines = []
    for number in range(8):
        Image.new("RGB", (90 + number, 60)).save(tmp_path / f"{number}.png")
        for question, answers in (("what is this", ["a page", "one"]), ("how many words are there on it", ["7"])):
            row = {"images": [f"{number}.png"], "question": question, "answers": answers, "dataset": "own"}
            lines.append(json.dumps(row))
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_a_users_data_are_read_without_decoding_an_image(jsonl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", None)
    folder = embedded_model()
    kind, config = read_model_kind(folder), RunConfig(data=DataConfig(jsonl))
    found = data_sizes(config, kind, folder)
    assert found.notes == ()
    for split in ("validation", "test"):
        assert len(found.rows[split]) == 4
        assert {(row.samples, row.branches, len(row.images)) for row in found.rows[split]} == {(2, 3, 1)}
    apart = replace(config, compute=ComputeConfig(sharing=False))
    rows = data_sizes(apart, kind, folder).rows["test"]
    assert [(row.samples, len(row.images)) for row in rows] == [(1, 1), (1, 0), (1, 0)] * 4
    assert sum(sum(row.size) for row in rows) == sum(row.alone for row in found.rows["test"])


def test_words_are_counted_without_a_tokenizer(jsonl: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(embedded_model() / "config.json", folder)
    kind = read_model_kind(folder)
    found = data_sizes(RunConfig(data=DataConfig(jsonl)), kind, folder)
    assert "A word has 1.5 tokens" in found.notes[0]
    assert {row.size[0] for row in found.rows["test"]} == {20 + 5 + 5 + (4 + 3) + 11 + 3}


def test_a_header_says_how_an_image_lies(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_dimensions(tmp_path / "turned.jpg", "s", upright=True) == (20, 40)
    assert image_dimensions(tmp_path / "turned.jpg", "s", upright=False) == (40, 20)
