"""The benchmark command, on a small layer and a short run of visual tokens: what it writes, not how fast it was."""

import json
from pathlib import Path

import pytest

from rlens_jax.commands import bench
from rlens_jax.console import run_command
from rlens_jax.engine import timing
from rlens_jax.flops import DecoderSizes

pytestmark = pytest.mark.slow


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
