"""The commands and the Python code of README.md, run as they are written, in a scratch folder with a model FOLDER."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from rlens_jax.commands.options import RunParser
from rlens_jax.data.pages import make_page
from rlens_jax.plan_file import FORMAT
from tests.first_layers import save_first_layers
from tests.reporting.runs import write_run
from tests.reporting.synthetic import synthetic_results
from tests.torch_support import tiny_qwen2_vl

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.strip()]
NUM_LAYERS = 2
NOT_RUN = {
    "pip install . && python -m rlens_jax.rank": "installs, and ranks for minutes (tests/test_rank.py runs it)",
    "python -m rlens_jax.compare FOLDER": "FOLDER is never right, so nothing is a share of it (tests/evaluation/test_compare.py)",
    'pip install -e ".[test,torch]" && .ci/install_browser && python -m pytest': "installs, and runs this test",
}
PARSED = {
    "python -m rlens_jax.rank --model FOLDER --data questions.jsonl": "ranks for minutes",
    "python -m rlens_jax.rank --config qwen2_vl_7b --model FOLDER --dry-run v5e:16x16": "compiles for minutes",
    "python -m rlens_jax.plan --budget loss=1% --model FOLDER --data questions.jsonl": "searches for minutes",
    "python -m rlens_jax.studies all": "takes 20 minutes",
}
PLACEHOLDERS = {"Qwen/Qwen2-VL-7B-Instruct": "FOLDER", "DATA": "questions.jsonl"}
"""Words of a command that stand for what a person has: the hub is not reached here."""


def starts(line: str, known: dict[str, str]) -> bool:
    return any(line.startswith(start) for start in known)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that README's commands name."""
    folder = tmp_path_factory.mktemp("scratch")
    model = save_first_layers(folder / "FOLDER", NUM_LAYERS)
    words = json.loads((model / "config.json").read_text())["vocab_size"]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(words))}))  # every token ends an answer
    Image.fromarray(make_page(np.random.default_rng(3), "test", augment=False).pixels).save(folder / "page.png")
    row = {"image": "page.png", "question": "digit at row 1 column 2 ?", "answer": "3", "dataset": "pages"}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    plan = {"format": FORMAT, "num_layers": NUM_LAYERS, "attention": [0, 1], "ffn": [1]}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "runs").mkdir()
    for name in ("mine", "other"):
        write_run(folder / "runs" / name, synthetic_results(28, 20, operators=("ffn",)))
    return folder


@pytest.fixture
def here(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(scratch)
    return scratch


def test_every_command_is_run_or_says_why_not() -> None:
    assert len(COMMANDS) >= 14
    for start in (*NOT_RUN, *PARSED):
        assert sum(line.startswith(start) for line in COMMANDS) == 1, start
    run = [line for line in COMMANDS if not starts(line, NOT_RUN)]
    assert [line for line in run if not re.match(r"python -m rlens_jax\.\w+ ", line)] == []


@pytest.mark.parametrize("line", [line for line in COMMANDS if starts(line, PARSED)])
def test_long_commands_have_known_options(line: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse_run, configs = RunParser.parse_run, []

    def stop(parser: RunParser, arguments: list[str]) -> None:
        configs.append(parse_run(parser, arguments)[1])
        sys.exit(0)

    monkeypatch.setattr(RunParser, "parse_run", stop)
    with pytest.raises(SystemExit):
        run(line, monkeypatch)
    assert [config.model for config in configs] == ["embedded" if " --model " not in line else "FOLDER"]


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.usefixtures("one_device")
def test_the_commands(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in COMMANDS:
        if not starts(line, NOT_RUN | PARSED):
            with pytest.raises(SystemExit) as ended:
                run(line, monkeypatch)
            assert not ended.value.code, line
    before, after = (load_file(here / folder / "model.safetensors") for folder in ("FOLDER", "back"))
    assert {name: array.tobytes() for name, array in after.items()} == {name: array.tobytes() for name, array in before.items()}
    assert (here / "runs" / "eval" / "evaluation.json").is_file()
    assert (here / "report.html").is_file() and (here / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.usefixtures("one_device")
def test_the_python_code(here: Path) -> None:
    code = [text for kind, text in BLOCKS if kind == "python"]
    assert len(code) == 2
    names: dict[str, Any] = {}
    exec(code[0], names)
    assert isinstance(names["text"], str)
    model = tiny_qwen2_vl(0, num_hidden_layers=24)
    names = {"model": model, "inputs": {"input_ids": torch.arange(1, 9)[None]}}
    exec(code[1], names)
    assert names["logits"].shape == (1, 8, model.config.text_config.vocab_size)


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in this process, as a module of the name that the line gives."""
    python, m, module, *arguments = (PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True))
    assert (python, m) == ("python", "-m")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__")
