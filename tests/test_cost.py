"""The command reproduces the check values of the method's description, and explains bad arguments."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlens_jax.commands.cost import main
from rlens_jax.console import run_command
from rlens_jax.plan_file import FORMAT, LEVELS_FORMAT


def run(arguments: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=arguments)
    return int(stopped.value.code or 0)


def last_layers(folder: Path, num_layers: int, count: int) -> Path:
    layers = list(range(num_layers - count, num_layers))
    path = folder / "plan.json"
    path.write_text(json.dumps({"format": FORMAT, "num_layers": num_layers, "attention": layers, "ffn": layers}))
    return path


def test_a_plan_with_levels(tmp_path: Path) -> None:
    """Op-Skip's smallest preset for Qwen2.5-VL-7B, whose layers have the sizes of Qwen2-VL-7B, saves 24.0 %."""
    plan, result = tmp_path / "plan.json", tmp_path / "cost.json"
    fields = {"freeze": [20, 21, 22, 23, 24, 25, 27], "attention_levels": [{"layers": [26], "skip": True}]}
    plan.write_text(json.dumps({"format": LEVELS_FORMAT, "num_layers": 28, **fields}))
    assert run(["qwen2-vl-7b", "--visual=1296", f"--plan={plan}", f"--json={result}"]) == 0
    assert abs(100 * (1 - json.loads(result.read_text())["with_probes"]["share_of_dense"]) - 24.0) < 0.1


@pytest.mark.parametrize(
    ("model", "num_layers", "reduced", "without_probes", "with_probes"),
    [("internvl2-8b", 32, 14, 72.2, 74.3), ("qwen2-vl-7b", 28, 12, 70.8, 73.1)],
)
def test_published_savings(
    tmp_path: Path, model: str, num_layers: int, reduced: int, without_probes: float, with_probes: float
) -> None:
    plan, result = last_layers(tmp_path, num_layers, reduced), tmp_path / "cost.json"
    assert run([model, f"--plan={plan}", f"--json={result}"]) == 0
    counted = json.loads(result.read_text())
    assert counted["num_layers"] == num_layers
    assert abs(100 * counted["without_probes"]["share_of_dense"] - without_probes) < 0.1
    assert abs(100 * counted["with_probes"]["share_of_dense"] - with_probes) < 0.1


@pytest.mark.parametrize(
    ("model", "drop", "percent"),
    [("internvl2-8b", "0.3", 71.6), ("qwen2-vl-7b", "0.3", 72.1), ("internvl2-8b", "0.5", 53.2), ("qwen2-vl-7b", "0.5", 53.9)],
)
def test_fastv_after_layer_two(tmp_path: Path, model: str, drop: str, percent: float) -> None:
    result = tmp_path / "cost.json"
    assert run([model, "--fastv", "2", drop, f"--json={result}"]) == 0
    assert abs(100 * json.loads(result.read_text())["without_probes"]["share_of_dense"] - percent) < 0.1


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["embedded", "--text=20", "--visual=32", "--vtw=6"]) == 0
    shown = capsys.readouterr().out
    assert "embedded: 12 layers, 20 text and 32 visual tokens\nplan: dense, VTW after layer 6\n" in shown
    assert shown.count("% of dense") == 2
    assert run(["llava-1.5-7b", "--visual=576", "--pruning=divprune:keep=128"]) == 0
    shown = capsys.readouterr().out
    assert "plan: dense, DivPrune keeps 128 visual tokens\n" in shown
    # (576 + 128) x 576 x 4096
    assert (
        "choosing tokens          1.661e+09 multiply-adds in addition\n128 visual tokens kept, 128.00 in a layer on average"
        in shown
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["qwen2-vl-7"], "neither a folder nor one of"),
        (["qwen2-vl-7"], "did you mean 'qwen2-vl-7b'"),
        (["qwen2-vl-7b", "--fastv", "28", "0.3"], "prunes after layer 28, but the model has 28 layers"),
        (["qwen2-vl-7b", "--fastv", "2", "1.0"], "share must be a decimal number at least 0 and below 1"),
        (["qwen2-vl-7b", "--fastv", "two", "0.5"], "must be a number of layers, not 'two'"),
        (["qwen2-vl-7b", "--vtw=14", "--folder=0.5"], "not allowed with"),
        (["qwen2-vl-7b", "--pruning=divprun:keep=4"], "did you mean 'divprune'"),
        (["qwen2-vl-7b", "--pruning=random"], "pruning.keep is missing: random needs a number of visual tokens"),
        (["qwen2-vl-7b", "--pruning=random:4"], "must have the form divprune:keep=64 or fastv:layer=2,share=0.5, not 'random:4'"),
        (["qwen2-vl-7b", "--pruning=random:keep=4,keep=5"], "gives keep twice"),
        (["qwen2-vl-7b", "--pruning=cdpruner:keep=4"], "needs CLIP's text tower, which no family has; use cdpruner-embeddings"),
        (["qwen2-vl-7b", "--pruning=random:keep=4", "--vtw=4"], "prunes already"),
        (["qwen2-vl-7b", "--visual=-1"], "must be numbers of tokens"),
        (["qwen2-vl-7b", "--vissual=1"], "did you mean '--visual'"),
    ],
)
def test_bad_input(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(options) == 2
    assert complaint in capsys.readouterr().err


def test_a_plan_for_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["internvl2-8b", f"--plan={last_layers(tmp_path, 28, 3)}"]) == 2
    assert "for a model with 28 layers, but this model has 32" in capsys.readouterr().err
