"""The model that VLMEvalKit asks, in a stand-in of its interface and, where it is installed, in VLMEvalKit itself."""

import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlens_jax.console import run_command
from rlens_jax.data.benchmarks.tfds_builder import read_benchmark
from rlens_jax.data.page_samples import read_pages
from rlens_jax.evaluation.datasets import Benchmark
from rlens_jax.evaluation.evaluation import EvaluationConfig
from rlens_jax.evaluation.evaluation_run import evaluate
from rlens_jax.harnesses import backends
from rlens_jax.harnesses.vlmevalkit import main
from rlens_jax.plan_file import FORMAT, read_plan
from tests.data.benchmarks.files import benchmark_rows, encoded, five_rows, md5_of, write_tsv
from tests.families.published import kind_of
from tests.harnesses.conftest import Recorder

PLAN = {"format": FORMAT, "attention": [8, 9, 10, 11], "ffn": [9, 10, 11], "attention_range": 16}


GQA, POPE = "GQA_TestDev_Balanced", "POPE"


def own_pages(folder: Path, name: str = POPE) -> Path:
    """Five questions for the embedded model as a file of a benchmark.

    It answers few of GQA's, whose prompt has words that it does not know. POPE's fourth has a reference that it will not give.
    """
    if name == GQA:
        pages = read_pages("test", 8)["pages_compare"]
        samples = [pages[place] for place in (0, 2, 4, 6, 7)]
    else:
        samples = read_pages("test", 5)["pages_yesno"]
    rows = benchmark_rows(name, images=5, questions=1)
    for number, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        (image,), (answer,) = sample.images, sample.answers
        wrong = number == 3 and name == POPE
        row |= {"question": sample.question, "image": encoded(image)}
        row["answer"] = {"yes": "no", "no": "yes"}[answer] if wrong else answer
    return write_tsv(folder / f"{name}.tsv", rows)


def as_pandas_reads(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float("nan") if text in ("", "None") else text for name, text in row.items()}


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen2_vl", "internvl_chat"])
@pytest.mark.parametrize("name", ["POPE", "GQA_TestDev_Balanced", "MMBench_DEV_EN", "MMMU_DEV_VAL"])
def test_asks_what_an_evaluation_asks(name: str, model_type: str, recorder: Recorder, tmp_path: Path) -> None:
    rows = five_rows(name)
    if name == "MMMU_DEV_VAL":
        rows[0]["question"] = "what is in <image 1> here?"
        rows[1] |= dict.fromkeys("ABCD", "")
    path = write_tsv(tmp_path / f"{name}.tsv", rows)
    expected = Benchmark(read_benchmark(name, tmp_path, tmp_path / "data", md5_of(path)), "", kind_of(model_type), None)
    model = importlib.import_module("rlens_jax.harnesses.vlmevalkit_model").PlanModel(recorder, kind_of(model_type), 7, None)
    files = []

    def dump_image(line: Any) -> list[str]:
        sample = expected.sample(len(files))
        files.append(tmp_path / f"{line['index']}.png")
        files[-1].write_bytes(sample.images[0])
        return [str(files[-1])]

    model.set_dump_image(dump_image)
    assert model.use_custom_prompt(name)
    assert not model.use_custom_prompt("MathVista")
    for place, row in enumerate(rows):
        message = model.build_prompt(as_pandas_reads(row), dataset=name)
        assert model.generate(message, dataset=name) == f"answer {place}"
        sample, asked = expected.sample(place), recorder.asked[place]
        assert asked.max_new_tokens == 7
        assert [path.read_bytes() for path in asked.images] == list(sample.images)  # type: ignore[union-attr]
        text, marked = asked.prompt()
        assert (text, marked) == (sample.question, sample.marked) or (
            # Marks that put the image first say what no marks say.
            not marked and sample.question == f"<image>{text}"
        )


@pytest.mark.usefixtures("stand_ins")
def test_a_run(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_pages(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    opened: list[Any] = []
    monkeypatch.setattr(backends, "open_backend", lambda *given, **options: opened.append((given, options)) or recorder)
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["it"])
    plan = ["--plan", str(tmp_path / "plan.json"), "--seed", "3", "--name", "rlens-x", "--max-new-tokens", "9"]
    plan += ["--repetition-penalty", "1"]
    main(["embedded", *plan, "--", "--data", "POPE", "--work-dir", str(tmp_path / "out")])
    (given, options), *_ = opened
    assert given == ("jax", "embedded", read_plan(tmp_path / "plan.json"))
    assert options == {"seed": 3, "dtype": None, "chunk": None, "model_shards": 1}
    with (tmp_path / "out" / "rlens-x_POPE.tsv").open(newline="") as file:
        assert [row["prediction"] for row in csv.DictReader(file, delimiter="\t")] == [f"answer {n}" for n in range(5)]
    assert [(question.max_new_tokens, question.repetition_penalty) for question in recorder.asked] == [(9, 1.0)] * 5


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["embedded"], "the options of VLMEvalKit are missing, such as -- --data POPE"),
        (["embedded", "--", "--data", "POPE", "--model", "x"], "after --, neither --model nor --config"),
        (["embedded", "--name", "my-Qwen2-VL", "--", "--data", "POPE"], "--name 'my-Qwen2-VL' must have letters"),
        (["embedded", "--plan", "opskip:no-model/1", "--", "--data", "POPE"], "opskip has no policy for 'no-model'"),
        (["embedded", "--backend", "torhc", "--", "--data", "POPE"], "invalid choice: 'torhc'"),
        (["embedded", "--max-new-tokens", "0", "--", "--data", "POPE"], "--max-new-tokens must be at least 1, not 0"),
        (["embedded", "--repetition-penalty", "0", "--", "--data", "POPE"], "--repetition-penalty must be a positive number"),
        (["embedded", "--backend", "torch", "--chunk", "8", "--", "--data", "POPE"], "options of the back end jax"),
        (["embedded", "--run", "none.py", "--", "--data", "POPE"], "--run none.py: no such file"),
        (["embedded", "--run", "gs://b/run.py", "--", "--data", "POPE"], "--run is gs://b/run.py: it must be a local path"),
        (["embedded", "--paln", "p.json", "--", "--data", "POPE"], "unknown option --paln (did you mean '--plan'?)"),
        (["nowhere/at-all", "--", "--data", "POPE"], "nowhere/at-all: no such folder"),
    ],
)
@pytest.mark.usefixtures("stand_ins")
def test_bad_input(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint in one_line(arguments, capsys)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "VLMEvalKit is not installed: install the extra vlmevalkit" in one_line(["embedded", "--", "--data", "POPE"], capsys)


def one_line(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=arguments, quiet=False)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1
    return line


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vlmeval") is None, reason="VLMEvalKit is not installed (extra vlmevalkit)")
@pytest.mark.usefixtures("one_device")
def test_vlmevalkit_itself(tmp_path: Path) -> None:
    """Its run answers and scores as `evaluate`, and it gives the predictions of `evaluate` the same score."""
    path, plan = own_pages(tmp_path, GQA), tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    config = EvaluationConfig(
        "embedded", read_plan(plan), (str(path),), tmp_path / "ours", md5={GQA: md5_of(path)}, timing_repeats=0
    )
    result = evaluate(config).datasets[GQA].variants["plan"].score
    assert result is not None and result.value == pytest.approx(40)
    ours, kit = tmp_path / "ours" / "plan" / f"{GQA}.tsv", tmp_path / "kit"
    run_kit(path, ["embedded", "--plan", str(plan), "--"], ["--work-dir", str(kit)])
    theirs = kit / "rlens-plan" / f"rlens-plan_{GQA}.tsv"
    assert predictions(theirs) == predictions(ours)
    assert score_of(kit / "rlens-plan") == pytest.approx(result.value)
    again = tmp_path / "again" / "rescored"
    again.mkdir(parents=True)
    (again / f"rescored_{GQA}.tsv").write_bytes(ours.read_bytes())
    run_kit(path, None, ["--model", "rescored", "--mode", "eval", "--work-dir", str(tmp_path / "again")])
    assert score_of(again) == pytest.approx(result.value)


def run_kit(path: Path, ours: Sequence[str] | None, theirs: Sequence[str]) -> None:
    """Run VLMEvalKit on a file of GQA, with our model, or alone; it would download a file that is not the published one."""
    options = ["--data", GQA, "--judge", "exact_matching", *theirs]
    code = f"import runpy, sys; from vlmeval.dataset import ImageVQADataset as It; It.DATASET_MD5[{GQA!r}] = {md5_of(path)!r}; "
    if ours is None:
        code += f"sys.argv = ['run.py', *{options!r}]; runpy.run_module('vlmeval.run', run_name='__main__')"
    else:
        code += f"from rlens_jax.harnesses.vlmevalkit import main; main({[*ours, *options]!r})"
    environment = {**os.environ, "PYTHONPATH": "", "LMUData": str(path.parent), "PRED_FORMAT": "tsv"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def predictions(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {row["index"]: row["prediction"] for row in csv.DictReader(file, delimiter="\t")}


def score_of(folder: Path) -> float:
    """The score in the file that VLMEvalKit wrote."""
    (path,) = folder.glob("*_acc.csv")
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    return float(row["Overall"])
