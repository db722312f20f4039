"""The commands convert and rank published weights of each further family, on a JSONL file of the user's images."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlens_jax.commands import convert, rank
from rlens_jax.console import run_command
from tests.families import internvl
from tests.families import llava_onevision as llava
from tests.families import minicpm_v as minicpm
from tests.families.test_llava_preparer import write_texts
from tests.torch_support import save_tiny

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.usefixtures("one_device")]

SIZES = ((40, 90), (61, 47), (24, 20), (33, 70))


def save_llava(folder: Path) -> Path:
    save_tiny(folder, llava.tiny_llava(4))
    llava.image_processor().save_pretrained(folder)
    write_texts(folder)
    return folder


def save_internvl(folder: Path) -> Path:
    internvl.save_native(folder, internvl.tiny_internvl(0))
    internvl.save_tokenizer(folder)
    return folder


def save_minicpm(folder: Path) -> Path:
    folder.mkdir()
    return minicpm.MiniCPMV(seed=0).save(minicpm.save_processing(folder))


SAVE: dict[str, Callable[[Path], Path]] = {
    "llava_onevision": save_llava,
    "internvl_chat": save_internvl,
    "minicpmv": save_minicpm,
}


def run(main: Callable[..., None], *arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=[str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("family", SAVE)
def test_convert_and_rank(family: str, tmp_path: Path) -> None:
    source, model, output = SAVE[family](tmp_path / "published"), tmp_path / "model", tmp_path / "out"
    assert run(convert.main, source, model) == 0
    rows = []
    for number, size in enumerate(SIZES):
        internvl.picture(number, *size).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what is this", "answer": "a page", "dataset": "own"})
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        run(
            rank.main,
            f"--model={model}",
            f"--data={data}",
            f"--output={output}",
            f"--compute.compilation_cache={tmp_path / 'compiled'}",
            "--compute.batch_size=2",
            "--compute.text_slots=64,512",
            "--compute.visual_slots=64,512,2048",
            "--compute.patch_slots=64,512,2048",
            "--reduction.attention_range=4",
            "--search.operators=ffn",
            "--search.change=absolute",  # random weights answer nothing right
            "--search.position_layers=3",
            "--report.random_rankings=1",
            "--report.timing_repeats=1",
            "--report.bootstrap_samples=20",
        )
        == 0
    )
    ranking = json.loads((output / "ranking.json").read_text())
    layers = ranking["model"]["num_layers"]
    assert sorted(ranking["rankings"]["ffn"]) == list(range(layers))
    assert ranking["rankings"]["ffn"][:3] == [layers - 1, layers - 2, layers - 3]
