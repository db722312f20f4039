"""The commands convert and rank published weights of each further family, on a JSONL file of the user's images."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.commands import convert, rank
from rlens_jax.config import ComputeConfig
from rlens_jax.console import run_command
from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.engine.preparing import prepare
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.shapes import choose_shapes, image_padding, row_padding
from rlens_jax.hosts.processes import Processes
from rlens_jax.resources import embedded_model
from tests.families import internvl, qwen2_5_vl, qwen3_vl
from tests.families import llava_onevision as llava
from tests.families import minicpm_v as minicpm
from tests.families.llava import save_llava as save_tiny_llava
from tests.families.test_llava_preparer import write_texts
from tests.first_layers import save_first_layers
from tests.torch_support import save_tiny

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.usefixtures("one_device")]

SIZES = ((40, 90), (61, 47), (24, 20))
MANY = tuple((20 + 37 * number % 90, 20 + 53 * number % 110) for number in range(30))
"""30 sizes of images, all different, from small to large and from tall to wide."""


def save_llava(folder: Path) -> Path:
    save_tiny(folder, llava.tiny_llava(4))
    llava.image_processor().save_pretrained(folder)
    write_texts(folder)
    return folder


def save_internvl(folder: Path) -> Path:
    """InternVL3.5."""
    internvl.save_native(folder, internvl.tiny_internvl(0, text_model="qwen3"))
    internvl.save_tokenizer(folder)
    return folder


def save_minicpm(folder: Path) -> Path:
    folder.mkdir()
    return minicpm.MiniCPMV(seed=0).save(minicpm.save_processing(folder))


def save_qwen(folder: Path) -> Path:
    shutil.copytree(embedded_model(), folder)
    return folder


SAVE: dict[str, Callable[[Path], Path]] = {
    "llava_next": partial(save_tiny_llava, family="llava_next", template="mistral", max_position_embeddings=2048),
    "llava_onevision": save_llava,
    "internvl_chat": save_internvl,
    "minicpmv": save_minicpm,
    "qwen2_vl": save_qwen,
    "qwen2_5_vl": qwen2_5_vl.save_random,
    "qwen3_vl": qwen3_vl.save_random,
}
# LLaVA-1.5 runs the code of LLaVA-NeXT. All Qwen-VL have one preparer, and the embedded model is ranked in other tests.
PREPARED = sorted(SAVE.keys() - {"qwen2_5_vl", "qwen3_vl"})
RANKED = sorted(SAVE.keys() - {"qwen2_vl"})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model."""
    return cache(lambda family: SAVE[family](tmp_path_factory.mktemp(family) / "published"))


def run(main: Callable[..., None], *arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=[str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def write_data(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """A JSONL file with an image of each size, and texts of some lengths."""
    rows = []
    for number, size in enumerate(sizes):
        internvl.picture(number, *size).save(folder / f"{number}.png")
        question = " ".join(["what is this"] * (1 + number % 3))
        rows.append({"image": f"{number}.png", "question": question, "answer": "a page", "dataset": "own"})
    data = folder / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.mark.parametrize("family", PREPARED)
def test_images_of_30_sizes_are_padded_little(family: str, published: Callable[[str], Path], tmp_path: Path) -> None:
    assert len(set(MANY)) == 30
    folder = published(family)
    kind = read_model_kind(folder)
    samples = read_jsonl(write_data(tmp_path, MANY))
    prepared = prepare(samples, kind.preparer(folder), True, Processes())
    assert len(prepared.row_sizes) > 8
    shapes = choose_shapes(ComputeConfig(), kind, [prepared])
    print(shapes.identity, row_padding(shapes, [prepared]), image_padding(shapes, [prepared]))
    assert len(shapes.rows) <= 8
    assert len(shapes.images) <= 8
    assert row_padding(shapes, [prepared]) <= 0.12
    # The same shapes as an array of the family's tower, whatever the image.
    for number in range(30):
        for image in prepared.images.take(number):
            arrays = shapes.arrays_of(shapes.image(image.size))
            assert all(np.less_equal(a.shape, shape).all() for a, (shape, _) in zip(image.arrays, arrays, strict=True))


def test_a_folder_and_a_file_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's values, and one compilation per program and bucket."""
    made, init = [], Programs.__init__

    def spied(self: Programs, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(Programs, "__init__", spied)
    data = write_data(tmp_path, MANY)
    folder, output = save_first_layers(tmp_path / "model", 4), tmp_path / "out"
    cheap = ["--search.position_layers=2", "--search.operators=ffn", "--search.change=absolute"]
    cheap += ["--report.timing_repeats=1", "--report.bootstrap_samples=20", "--compute.max_buckets=2"]
    places = [f"--output={output}", f"--compute.compilation_cache={tmp_path / 'compiled'}"]
    assert run(rank.main, f"--model={folder}", f"--data={data}", *places, *cheap) == 0
    said = capsys.readouterr().err
    assert "R = 256, 20 % of the FFN units, 10 % of the visual tokens as probes (as in the paper)" in said
    assert "dtype: float32 (by the device)" in said
    ranking = json.loads((output / "ranking.json").read_text())
    assert ranking["configuration"]["reduction"]["attention_range"] == 256
    assert ranking["configuration"]["compute"]["dtype"] == "float32"
    rows, images = ranking["buckets"]["rows"], ranking["buckets"]["images"]
    assert len(rows) == len(images) == 2
    traces = made[-1].traces
    assert traces["encode"] == len(images)
    assert traces["embed"] == traces["outcome"] == traces["layers"] == len(rows)
    assert traces["generate"] <= len(rows)


@pytest.mark.parametrize("family", RANKED)
def test_convert_and_rank(family: str, published: Callable[[str], Path], tmp_path: Path) -> None:
    """To the rankings; with deepstack, which the timed prefills have too, to the report."""
    model, output = tmp_path / "model", tmp_path / "out"
    assert run(convert.main, published(family), model) == 0
    data, report = write_data(tmp_path, SIZES), family == "qwen3_vl"
    assert (
        run(
            rank.main,
            f"--model={model}",
            f"--data={data}",
            f"--output={output}",
            f"--report={'full' if report else 'none'}",
            f"--compute.compilation_cache={tmp_path / 'compiled'}",
            "--compute.batch_size=2",
            "--compute.text_slots=512",
            "--compute.visual_slots=128",
            "--compute.patch_slots=512",
            "--reduction.attention_range=4",
            "--search.operators=ffn",
            "--search.change=absolute",  # random weights answer nothing right
            "--search.position_layers=3",
            "--report.timing_repeats=1",
            "--report.bootstrap_samples=20",
        )
        == 0
    )
    ranking = json.loads((output / "ranking.json").read_text())
    layers = ranking["model"]["num_layers"]
    assert sorted(ranking["rankings"]["ffn"]) == list(range(layers))
    assert ranking["rankings"]["ffn"][:3] == [layers - 1, layers - 2, layers - 3]
    assert (output / "report.md").exists() == report
