"""The model that lmms-eval asks, in a stand-in of its interface and, where it is installed, in lmms-eval itself."""

import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlens_jax.errors import UserError
from rlens_jax.harnesses import backends
from rlens_jax.plan_file import PlanFile
from tests.harnesses.conftest import Recorder
from tests.harnesses.test_vlmevalkit import PLAN, own_pages

ROOT = Path(__file__).parents[2]
PIXELS = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture
def adapter(stand_ins: None, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("rlens_jax.harnesses.lmms_eval")
    monkeypatch.setattr(module, "open_backend", lambda *given, **options: recorder)
    return module


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


IMAGE = {"type": "image", "url": Image.fromarray(PIXELS)}


def requests(*messages: list[dict[str, Any]], **settings: Any) -> list[Any]:
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    return [instance(("", messages.__getitem__, settings, place, "it", "test")) for place in range(len(messages))]


def asked(model: Any, *messages: list[dict[str, Any]], **settings: Any) -> list[str]:
    model.task_dict = {"it": {"test": range(len(messages))}}
    return model.generate_until(requests(*messages, **settings))


def test_the_entry_point(adapter: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, _, function = project["entry-points"]["lmms_eval.models"]["rlens_jax"].partition(":")
    manifest = getattr(importlib.import_module(name), function)()
    assert (manifest.model_id, manifest.simple_class_path) == ("rlens_jax", None)
    module, _, chat_class = manifest.chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), chat_class) is adapter.PlanModel
    assert not adapter.PlanModel.is_simple


def test_answers(adapter: ModuleType, recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapter.PlanModel(batch_size=2)
    first = [{"role": "user", "content": [IMAGE, text("what "), text("is it?")]}]
    second = [{"role": "user", "content": [text("compare"), IMAGE, IMAGE]}]
    assert asked(model, first, second, max_new_tokens=16, temperature=0, until=["\n\n"]) == ["answer 0", "answer 1"]
    assert [question.prompt() for question in recorder.asked] == [("what is it?", False), ("compare<image><image>", True)]
    assert [question.max_new_tokens for question in recorder.asked] == [16, 16]
    (file,) = recorder.asked[0].images
    assert isinstance(file, bytes) and np.array_equal(np.asarray(Image.open(io.BytesIO(file))), PIXELS)
    assert capsys.readouterr().err == ""
    assert asked(model, first, until=["er", "ans"], do_sample=True) == [""]
    assert asked(model, first, until="er", num_beams=3) == ["answ"]
    assert (recorder.asked[-1].max_new_tokens, recorder.asked[-1].repetition_penalty) == (512, None)
    model = adapter.PlanModel(repetition_penalty=1)
    assert asked(model, first) == ["answer 4"] and recorder.asked[-1].repetition_penalty == 1
    assert asked(model, first, repetition_penalty=1.1) == ["answer 5"] and recorder.asked[-1].repetition_penalty == 1.1
    assert capsys.readouterr().err == "note: it asks for sampling or beams; the answers are greedy\n" * 2
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="are not supported"):
            method([])


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "system", "content": [text("be brief")]}, "it: has a turn of the role system"),
        ({"role": "user", "content": [{"type": "video", "url": "it.mp4"}]}, "it: has a part of the type video"),
    ],
)
def test_what_cannot_be_asked(message: dict[str, Any], complaint: str, adapter: ModuleType) -> None:
    with pytest.raises(UserError, match=complaint):
        asked(adapter.PlanModel(), [message])


def test_model_arguments(adapter: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(adapter, "open_backend", lambda *given, **options: opened.append((given, options)))
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    adapter.PlanModel(model="embedded", plan=str(tmp_path / "plan.json"), backend="torch", device="cpu", dtype="float32")
    adapter.PlanModel(batch_size="4", seed=2)
    assert opened[0][0][:2] == ("torch", "embedded") and opened[0][0][2].plan.attention == (8, 9, 10, 11)
    assert opened[0][1] == {"seed": 0, "dtype": "float32", "device": "cpu"}
    assert opened[1] == (("jax", "embedded", PlanFile()), {"seed": 2, "dtype": None, "batch_size": 4})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"paln": "plan.json"}, r"unknown model argument 'paln' \(did you mean 'plan'\?\); there are model, plan, attention"),
        ({"plan": "none.json"}, "none.json"),
        ({"plan": "opskip:llava-1.5-7b/12", "ffn": 3}, "first layers can be chosen from a ranking.json only"),
        ({"ffn": 3}, "attention and ffn need a plan that is a ranking.json"),
        ({"backend": "torhc"}, "unknown back end 'torhc'"),
        ({"batch_size": "auto"}, "the batch size must be a whole number of at least 1, not auto"),
        ({"repetition_penalty": "much"}, "repetition_penalty must be a positive number, not much"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], complaint: str, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "open_backend", backends.open_backend)
    with pytest.raises(UserError, match=complaint):
        adapter.PlanModel(**arguments)


def test_bad_arguments_of_the_command(adapter: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """lmms-eval would print a traceback."""
    assert isinstance(adapter.PlanModel.create_from_arg_string("seed=3", {"batch_size": 2, "device": None}), adapter.PlanModel)
    with pytest.raises(SystemExit) as stopped:
        adapter.PlanModel.create_from_arg_string("plan=none.json", {"batch_size": 2})
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: cannot read none.json") and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (extra lmms-eval)")
def test_lmms_eval_itself(tmp_path: Path) -> None:
    """The worked example of docs/harnesses.md: a task over VLMEvalKit's POPE.tsv. Four of five answers are right."""
    path, plan = own_pages(tmp_path), tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    (tmp_path / "tasks").mkdir()
    page = (ROOT / "docs" / "harnesses.md").read_text(encoding="utf-8")
    for name in ("pope_tsv.yaml", "utils.py"):
        (block,) = re.findall(rf"`tasks/{name}`:\n\n```\w+\n(.*?)```", page, re.DOTALL)
        (tmp_path / "tasks" / name).write_text(block.replace("LMUData/POPE.tsv", str(path)))
    arguments = ["--model", "rlens_jax", "--model_args", f"model=embedded,plan={plan}", "--tasks", "pope_tsv"]
    folders = ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "lmms_eval", *arguments, *folders, "--batch_size", "5"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("*_results.json")
    scores = json.loads(results.read_text())["results"]["pope_tsv"]
    assert scores["pope_accuracy,none"] == pytest.approx(0.8)
