"""The options that commands share mean the same in every command; what cannot be written is refused before any work."""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlens_jax.commands import cost, report, validate
from rlens_jax.commands.options import RunParser, new_file
from rlens_jax.config import RunConfig
from rlens_jax.console import run_command
from rlens_jax.errors import UserError
from rlens_jax.parity import dump
from rlens_jax.plan_file import FORMAT
from rlens_jax.plans import Plan
from rlens_jax.resources import embedded_model

SPELLINGS = {
    "rank": ("--model", "--revision", "--data", "--output", "--dtype", "--batch-size"),
    "studies": ("--model", "--revision", "--data", "--output", "--dtype", "--batch-size"),
    "evaluate": ("--model", "--revision", "--data", "--output", "--dtype", "--batch-size", "--plan"),
    "compare": ("--model", "--revision", "--data", "--output", "--dtype", "--batch-size"),
    "generate": ("--model", "--revision", "--dtype", "--plan"),
    "validate": ("--model", "--revision", "--dtype", "--plan"),
    "cost": ("--model", "--revision", "--plan"),
    "bench": ("--model", "--revision"),
    "convert": ("--model", "--revision", "--output", "--dtype"),
    "report": ("--output",),
}


def refusal(command: str, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refused command."""
    main = importlib.import_module(f"rlens_jax.commands.{command}").main
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1), err
    return err.removeprefix("error: ").rstrip("\n")


def run(*arguments: str) -> RunConfig:
    return RunParser("rank", "", "").parse_run(arguments)[1]


@pytest.mark.parametrize("command", SPELLINGS)
def test_every_command_has_the_same_spellings(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(f"rlens_jax.commands.{command}").main(["--help"])
    shown = capsys.readouterr().out
    assert [name for name in SPELLINGS[command] if f"  {name} " not in shown and f", {name} " not in shown] == []


def test_short_spellings_of_a_run() -> None:
    config = run("--data", "own.jsonl", "--dtype", "bfloat16", "--batch-size=4")
    assert (config.data.source, config.compute.dtype, config.compute.batch_size) == ("own.jsonl", "bfloat16", 4)
    assert run("--dtype", "bfloat16", "--compute.dtype", "bfloat16").compute.dtype == "bfloat16"
    assert run("--dtype", "bfloat16", "--dtype", "float32").compute.dtype == "float32"  # the same spelling: the later wins


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--dtype", "bfloat16", "--compute.dtype", "float32"], "--dtype bfloat16 and --compute.dtype float32 differ; give one"),
        (["--compute.batch_size=2", "--batch-size=4"], "--compute.batch_size 2 and --batch-size 4 differ; give one"),
        (["--data.source=a.jsonl", "--data=b.jsonl"], "--data.source a.jsonl and --data b.jsonl differ; give one"),
        (["--dtype", "float8"], "compute.dtype must be .*, not float8"),
        (["--output", "gs:/bucket/run"], "gs:/bucket/run: gs://bucket/folder has two slashes"),
        (["--output", "gs://bucket/../run"], "gs://bucket/../run: not the address of a folder or an object"),
        (["--data.cache=gs://b"], "data.cache is gs://b: it must be a local path"),
        (["--revision", "v1"], "embedded: only a name on the hub has a --revision"),
    ],
)
def test_contradictions_of_a_run(options: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        run(*options)


def test_a_revision_becomes_part_of_the_model() -> None:
    assert run("--model=Owner/name", "--revision=v1").model == "Owner/name@v1"


def test_model_as_argument_and_as_option(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for arguments in (["qwen2-vl-7b"], ["--model", "qwen2-vl-7b"], ["--text", "64", "qwen2-vl-7b", "--model=qwen2-vl-7b"]):
        cost.main(arguments)
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    assert refusal("cost", ["qwen2-vl-7b", "--model=embedded"], capsys) == (
        "MODEL qwen2-vl-7b and --model embedded differ; give one; see python -m rlens_jax.cost --help"
    )


@pytest.mark.parametrize(
    ("command", "arguments", "complaint"),
    [
        *((command, [], "MODEL is missing") for command in ("cost", "evaluate")),
        ("generate", ["--prompt", "x"], "MODEL is missing"),
        ("convert", [], "SRC is missing"),
        ("convert", ["--model", "embedded"], "DST is missing"),
        ("evaluate", ["embedded", "--output=nosuch://b/c"], "nosuch://: not a kind of store that can be used"),
        ("cost", ["qwen2-vl-7b", "--json=gs:/b/c.json"], "gs:/b/c.json: gs://bucket/folder has two slashes"),
        ("convert", ["embedded", "a", "--output", "b"], "DST a and --output b differ; give one"),
        ("convert", ["--dtype", "float32", "a", "--model=b", "c"], "SRC a and --model b differ; give one"),
        ("validate", ["--revision=v1", "--rankings", "1,0", "0,1"], "--revision needs a MODEL"),
        ("validate", ["embedded", "--model=embedded", "--rankings", "1,0", "0,1"], "--rankings takes no MODEL"),
        ("validate", ["embedded", "--dump", "x", "--layers=12"], "--layers has no meaning with --dump"),
        ("validate", ["embedded", "--dump", "x", "--json=y"], "--json has no meaning with --dump"),
        ("validate", ["embedded", "--reference", "x", "--no-states"], "--no-states has no meaning with --reference"),
        ("validate", ["--rankings", "1,0", "0,1", "--plan=x"], "--plan has no meaning with --rankings"),
        ("validate", ["embedded", "--dump", "x", "--attention=a"], "'a' is not a list of layers such as 20,21"),
        ("validate", ["embedded", "--dump", "x", "--plan=p", "--ffn=1"], "--plan and --ffn contradict each other"),
        ("validate", ["embedded", "--dump", "x", "--plan", "none.json"], "cannot read none.json"),
        ("generate", ["embedded", "--prompt=x", "--image", "none.png"], "the prompt: image 1: no such file: none.png"),
        ("generate", ["embedded", "--prompt= "], "the prompt: is empty"),
        ("generate", ["embedded", "--prompt=x", "--max-new-tokens=0"], "--max-new-tokens must be at least 1, not 0"),
        ("studies", ["all", "--ranking", "none.json"], "cannot read none.json"),
        ("bench", ["--repeats", "0"], "--repeats must be at least 1, not 0"),
        ("bench", ["qwen2-vl-2bb"], "qwen2-vl-2bb: neither a folder nor one of internvl2-8b, "),
        ("cost", ["Owner/nothing"], "Owner/nothing: no such folder, and the hub cannot provide it"),
        ("generate", ["Owner/nothing", "--prompt", "x"], "Owner/nothing: no such folder, and the hub cannot provide it"),
        ("evaluate", ["FOLDER"], "--data DATA is missing: name the data to score the model on"),
        ("compare", ["FOLDER"], "--data DATA is missing: name the data to score the model on"),
        ("compare", ["--methods", ","], "--methods names no method"),
        ("compare", ["--timing-repeats=0"], "--timing-repeats must be at least 1, not 0"),
        ("evaluate", ["embedded", "--revision=v1"], "embedded: only a name on the hub has a --revision"),
    ],
)
def test_bad_models(command: str, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(command, arguments, capsys).startswith(complaint)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("rank", ["--output", "{}"]),
        ("studies", ["all", "--output", "{}"]),
        ("evaluate", ["embedded", "--output", "{}"]),
        ("compare", ["--output", "{}"]),
        ("convert", ["embedded", "{}"]),
        ("validate", ["embedded", "--dump", "{}"]),
        ("report", [".", "--output", "{}"]),
        ("report", [".", "--output", "{}.html"]),
        ("rank", ["--dry-run=v5e:2x2", "--json", "{}.json"]),
        ("cost", ["embedded", "--json", "{}.json"]),
        ("bench", ["--json", "{}.json"]),
        ("doctor", ["--json", "{}.json"]),
        ("validate", ["--rankings", "1,0", "0,1", "--json", "{}.json"]),
        ("validate", ["--rankings", "1,0", "0,1", "--markdown", "{}.md"]),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(
    command: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and allowed(path, mode))
    for folder, reason in (("file/x", "is a file"), ("closed/x", "no permission to write"), ("y" * 300 + "/x", "name too long")):
        assert reason in refusal(command, [argument.format(folder) for argument in arguments], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file"]


def test_a_file_for_results_needs_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"the folder {tmp_path / 'no'} does not exist" in refusal("cost", ["embedded", f"--json={tmp_path}/no/x"], capsys)
    assert "it is a folder" in refusal("cost", ["embedded", f"--json={tmp_path}"], capsys)
    # Even the superuser makes no files there, though its permissions say so.
    with pytest.raises(UserError, match=r"^cannot write /proc/x: No such file or directory$"):
        new_file("/proc/x")


def test_the_report_goes_to_a_folder_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "read_run", lambda folder: folder)
    monkeypatch.setattr(report, "report_html", lambda runs: json.dumps(list(map(str, runs))))
    for output, written in (("new/folder", "new/folder/report.html"), ("all.html", "all.html")):
        report.main(["a", "b", "--output", str(tmp_path / output)])
        assert (tmp_path / written).read_text() == '["a", "b"]'


def test_a_plan_for_another_model_is_refused_before_the_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": FORMAT, "num_layers": 28, "ffn": [27]}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((embedded_model() / "config.json").read_bytes())
    arguments = [str(tmp_path / "model"), f"--plan={plan}"]
    for command, further in (
        ("cost", []),
        ("generate", ["--prompt=x"]),
        ("evaluate", ["--data=pages", f"--output={tmp_path / 'out'}"]),
    ):
        assert "28" in refusal(command, [*arguments, *further], capsys)
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, calls = tmp_path / "plan.json", []
    plan.write_text(json.dumps({"format": FORMAT, "num_layers": 12, "ffn": [11], "attention_range": 7}))
    monkeypatch.setattr(dump, "dump", lambda *arguments: calls.append(arguments) or arguments[1])
    validate.main(["embedded", "--dump", "bundle", "--plan", str(plan)])
    ((model, folder, plans, reduction, with_states, _),) = calls
    assert (model, folder, with_states) == ("embedded", Path("bundle"), True)
    assert (plans, reduction.attention_range) == ([Plan(), Plan(ffn=(11,))], 7)
