"""What timings count and write, not how fast anything was: of the benchmark command, and of prefills of a toy model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlens_jax.commands import bench
from rlens_jax.console import run_command
from rlens_jax.engine import timing
from rlens_jax.engine.inputs import build_split
from rlens_jax.flops import DecoderSizes, prefill_cost
from rlens_jax.models.prompt import FILLER
from rlens_jax.plans import Plan
from tests.engine.toy import LAYERS, REDUCTION, SHAPES, ToyPreparer, toy_programs, toy_samples

pytestmark = pytest.mark.slow


def test_a_range_over_all_visual_tokens_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So no share of it can be realised."""
    layers = dict.fromkeys((timing.OURS, timing.NO_ATTENTION, *timing.CASES), lambda: np.zeros(1))
    monkeypatch.setattr(timing, "layer_programs", lambda *arguments: dict(layers))
    monkeypatch.setattr(timing, "torch_layer", lambda *arguments: None)
    bench.main(["qwen2-vl-2b", f"--json={tmp_path / 'bench.json'}", "--repeats=2", "--visual-tokens=16"])
    cases = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert (cases["attention"]["flops_saved"], cases["attention"]["realised_saving"]) == (0, None)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(timing.CASES))]
    assert ["realised" in line for line in shown] == [False, True, True]


def test_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "find_decoder", lambda model: DecoderSizes(4, 256, 4, 2, 64, 1024, qkv_bias=True))
    path = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as stopped:
        run_command(bench.main, argv=["--json", str(path), "--repeats", "2", "--visual-tokens", "320"])
    assert not stopped.value.code
    results = json.loads(path.read_text())
    assert (results["visual_tokens"], results["decides"]) == (320, "least cpu")
    assert timing.OURS in results["dense"]
    assert len(results["dense"]) == 5  # ours, three others, and PyTorch's
    for found in (*results["dense"].values(), *results["cases"].values()):
        assert found["seconds"] == found["times"]["cpu"]["least"] <= found["times"]["cpu"]["median"]
        assert found["times"]["wall"]["spread"] >= 1
    fastest = min(
        (name for name in results["dense"] if "PyTorch" not in name), key=lambda name: results["dense"][name]["seconds"]
    )
    dense = results["dense"][fastest]
    without = results["without_attention"]
    assert without["time_saved"] == pytest.approx(1 - without["seconds"] / dense["seconds"])
    printed = capsys.readouterr().out
    for name in ("attention", "ffn", "both"):
        case = results["cases"][name]
        assert case["time_saved"] == pytest.approx(1 - case["seconds"] / dense["seconds"])
        medians = [found["times"]["wall"]["median"] for found in (case, dense)]
        assert case["time_saved_by_median_wall"] == pytest.approx(1 - medians[0] / medians[1])
        assert case["realised_saving"] == pytest.approx(case["time_saved"] / case["flops_saved"])
        assert name in printed
    assert results["cases"]["both"]["flops_saved"] > results["cases"]["ffn"]["flops_saved"] > 0.3


@pytest.mark.usefixtures("one_device")
def test_flops_of_a_batch_are_those_of_its_prompts_without_padding() -> None:
    """What questions about one image share counts once."""
    programs, plan = toy_programs(), Plan((1, 2), (0, 3))
    sizes, samples = programs.config.layer_sizes, toy_samples()
    twins = [replace(sample, id=f"{sample.id} again", question=sample.question + "xy") for sample in samples]
    flops = {}
    for sharing in (False, True):
        split = build_split([*samples, *twins], ToyPreparer(), programs, SHAPES, False, sharing=sharing)
        flops[sharing] = [timing.layer_flops(programs, batch, plan) for batch in split.batches]
        assert any((batch.inputs.samples == FILLER).any() for batch in split.batches)
    alone = sum(
        prefill_cost(sizes, int(text), [int(visual)] * LAYERS, plan, REDUCTION, with_probes=True)
        for text, visual in zip(split.num_text, split.num_visual, strict=True)
    )
    assert sum(flops[False]) == 2 * alone
    assert alone < sum(flops[True]) < 1.8 * alone
    assert np.ptp(flops[True]) > 0
