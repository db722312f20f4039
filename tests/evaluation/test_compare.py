"""The comparison as a person runs it: stopped anywhere and resumed, with further methods, from folders of other runs."""

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from rlens_jax.console import run_command
from rlens_jax.data.pages import VOCABULARY
from rlens_jax.evaluation import method_table
from rlens_jax.evaluation.measured import Measured, Measurements
from rlens_jax.plan_file import FORMAT
from tests.evaluation.test_evaluate import png
from tests.first_layers import save_first_layers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

SCHEMA = json.loads((Path(method_table.__file__).parent / "comparison.schema.json").read_text())
METHODS = "plan.json,downsample@0.75"
QUESTIONS = 6


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: two layers of the embedded model, a plan, and questions to which any word is an answer, or none."""
    folder = tmp_path_factory.mktemp("here")
    save_first_layers(folder / "FOLDER", 2)
    (folder / "plan.json").write_text(json.dumps({"format": FORMAT, "ffn": [1], "active_fraction": 0.02}))
    rows = []
    for number in range(QUESTIONS):
        if number % 3 == 0:
            (folder / f"{number}.png").write_bytes(png(np.random.default_rng(number))[0])
        answers = ["nothing"] if number == 4 else list(VOCABULARY)
        question = f"digit at row {number % 3 + 1} column 1 ?"
        rows.append({"image": f"{number - number % 3}.png", "question": question, "answers": answers, "dataset": "digits"})
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def compare(*arguments: str) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        run_command(importlib.import_module("rlens_jax.commands.compare").main, argv=arguments)
    return int(stopped.value.code or 0)


def arguments(output: Path, methods: str = METHODS, *more: str) -> Sequence[str]:
    settings = ("--max-new-tokens=1", "--bootstrap-samples=50", "--timing-repeats=2", f"--methods={methods}")
    return ["FOLDER", f"--output={output}", *settings, *more, "--data", "own.jsonl"]


@pytest.fixture(scope="module")
def finished(here: Path) -> Path:
    """The folder of a comparison that was stopped between the answers and the measurement of a method, and resumed."""
    output, append = here / "run", Measurements.append
    with pytest.MonkeyPatch.context() as patch:
        left = [1]

        def stop_later(self: Measurements, item: Measured) -> None:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            append(self, item)

        patch.setattr(Measurements, "append", stop_later)
        assert compare(*arguments(output)) == 130
    assert not (output / "comparison.json").exists()
    # What a power cut leaves.
    with (output / "measurements.jsonl").open("ab") as file:
        file.write(b'{"key": "a')
    assert compare(*arguments(output)) == 0
    return output


def test_the_table(finished: Path) -> None:
    fields = json.loads((finished / "comparison.json").read_text())
    jsonschema.validate(fields, SCHEMA)
    dense, plan, smaller = fields["methods"]
    assert [row["name"] for row in fields["methods"]] == ["dense", "plan.json", "downsample@0.75"]
    assert fields["datasets"]["digits"]["questions"] == QUESTIONS and fields["datasets"]["digits"]["images"] == 2
    assert 0 < dense["datasets"]["digits"]["value"] < 100
    assert (dense["visual_tokens"]["first"], plan["visual_tokens"]["mean"]) == (128, 128)
    assert 66 <= smaller["visual_tokens"]["first"] <= 96
    asked = fields["datasets"]["digits"]["asked"]
    assert (asked["max_new_tokens"], asked["repetition_penalty"], asked["limits"]) == (1, 1.0, {})
    assert plan["costs"]["multiply_adds"] < 1 and plan["costs"]["kv_bytes"] == 1
    assert smaller["kv_bytes"] < dense["kv_bytes"]
    for row in fields["methods"]:
        assert all(len(times["repeats"]) == len(times["dense_repeats"]) == 2 for times in row["times"].values())
        assert row["peak_memory"]["bytes"] > 10**8
    assert (finished / "report.html").stat().st_size < 3_000_000


def test_each_answer_and_measurement_is_made_once(finished: Path) -> None:
    answers = [json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines()[1:]]
    assert len({(answer["variant"], answer["question"]) for answer in answers}) == len(answers) == 3 * QUESTIONS
    measured = [json.loads(line) for line in (finished / "measurements.jsonl").read_text().splitlines()[1:]]
    assert [each["name"] for each in measured] == ["dense", "plan.json", "downsample@0.75"]


def test_a_method_is_added(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there is not made again: the logs only grow."""
    before = {name: (finished / f"{name}.jsonl").read_bytes() for name in ("answers", "measurements")}
    assert compare(*arguments(finished, f"folder@0.5,{METHODS}")) == 0
    after = {name: (finished / f"{name}.jsonl").read_bytes() for name in before}
    assert all(after[name].startswith(text) for name, text in before.items())
    assert after["measurements"].count(b"\n") == before["measurements"].count(b"\n") + 1
    fields = json.loads((finished / "comparison.json").read_text())
    assert [row["name"] for row in fields["methods"]] == ["dense", "folder@0.5", "plan.json", "downsample@0.75"]
    folder = fields["methods"][1]
    assert (folder["visual_tokens"]["first"], folder["costs"]["kv_bytes"] < 1) == (64, True)
    assert folder["multiply_adds"]["selection"] > 0
    assert "Report: " in capsys.readouterr().out


def test_limits_of_images_bound_down_sampling(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pages have 8192 pixels: smaller images would be enlarged to as many."""
    assert compare(*arguments(here / "bounded", "downsample@0.75", "--min-pixels=8192")) == 2
    assert "all images of this model have as many visual tokens" in capsys.readouterr().err
    assert not (here / "bounded").exists()


def test_the_folder_of_another_comparison(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*arguments(finished, METHODS, "--batch-size=2")) == 2
    assert "belongs to a run of another configuration: batch_size was 8, is 2" in capsys.readouterr().err
