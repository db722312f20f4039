"""The command `rank`: results, bad input in one line, kills and restarts."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlens_jax.commands.rank import main
from rlens_jax.console import run_command
from rlens_jax.data.page_samples import read_pages
from rlens_jax.plan_file import read_plan
from rlens_jax.reporting.run_files import read_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

SMALL = (
    "--data.validation_samples=2",
    "--data.confirmation_samples=0",
    "--data.test_samples=2",
    "--search.position_layers=9",
    "--joint.budget=null",
    "--report.random_rankings=1",
    "--report.timing_repeats=1",
    "--report.bootstrap_samples=50",
    "--compute.cpu_devices=1",  # whatever the number of cores
)
EVALUATIONS = 3 * 4 // 2 + 9 + 1
"""Per operator: 9 of the 12 layers are ranked by position."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def options(cache: Path, output: Path) -> list[str]:
    return [f"--output={output}", f"--data.cache={cache / 'data'}", f"--compute.compilation_cache={cache / 'compiled'}", *SMALL]


def rank(arguments: Sequence[str]) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=arguments)
    return int(stopped.value.code or 0)


def started(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Run the command in a new process."""
    # A shell's background jobs ignore Ctrl-C, and pass that on.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "rlens_jax.rank", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without interruptions; the file `terminal` beside it has what the run said."""
    output = tmp_path_factory.mktemp("finished") / "run"
    process = started(options(cache, output))
    _, said = process.communicate()
    assert process.returncode == 0, said
    (output.parent / "terminal").write_text(said, encoding="utf-8")
    return output


def test_results(finished: Path) -> None:
    result = json.loads((finished / "ranking.json").read_text())
    for operator in ("attention", "ffn"):
        assert sorted(result["rankings"][operator]) == list(range(12))
        assert result["rankings"][operator][:9] == [11, 10, 9, 8, 7, 6, 5, 4, 3]
    for name in (
        "report.md",
        "report.html",
        "examples.json",
        "timing.json",
        "config.yaml",
        "curves.png",
        "curves.svg",
        "candidates.png",
        "candidates.svg",
    ):
        assert (finished / name).stat().st_size > 100


def test_generated_answers_score_as_forced_ones(finished: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "generated"
    extra = ["--search.objective=generation", "--search.max_new_tokens=6", "--search.operators=ffn"]
    assert rank([*options(cache, output), *extra]) == 0
    forced, generated = (json.loads((folder / "ranking.json").read_text()) for folder in (finished, output))
    assert generated["dense"] == forced["dense"]
    assert generated["rankings"]["ffn"] == forced["rankings"]["ffn"]
    assert generated["held_out"]["ffn"]["curves"] == forced["held_out"]["ffn"]["curves"]


def test_a_folder_of_images_is_ranked_by_fidelity(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without labels: on the dense model's own answers, which a second run reads, and by agreement on held-out images."""
    (tmp_path / "images").mkdir()
    pages = dict.fromkeys(sample.images[0] for sample in read_pages("validation", 3)["pages_read"])
    for number, page in enumerate(pages):
        (tmp_path / "images" / f"page{number}.png").write_bytes(page)
    run = tmp_path / "run"
    arguments = [*options(cache, run), f"--data={tmp_path / 'images'}", "--search.operators=ffn", "--compute.text_slots=null"]
    assert rank([*arguments, "--search.objective=teacher_forced"]) == 2
    assert (
        "page" not in (told := capsys.readouterr().err) and "have no answers, which search.objective teacher_forced needs" in told
    )
    arguments += ["--search.objective=kl", "--search.max_new_tokens=4"]
    assert rank(arguments) == 0
    written = {name: (run / name).read_bytes() for name in ("ranking.json", "own_answers.json")}
    result, own = (json.loads(content) for content in written.values())
    assert {name.split("/")[0] for name in own["answers"]} == {f"page{number}.png" for number in range(len(pages))}
    assert all(len(answer["tokens"]) <= 4 for answer in own["answers"].values())
    assert result["dense"]["validation"]["images"] == pytest.approx(0.0, abs=1e-6)
    assert result["dense"]["test"]["images"] == 1.0
    scores = [candidate["score"] for candidate in result["search"]["ffn"]["rounds"][0]["candidates"]]
    assert max(scores) <= 0 and min(scores) < -1e-4
    assert 0 <= result["search"]["ffn"].get("noise", 0.0) < 1e-5
    saving = result["savings"]["ffn"]
    largest, mean = saving["largest_divergence"], -result["search"]["ffn"]["scores"][len(saving["plan"]["ffn"])]
    assert largest > mean > 0
    assert f"in nats: Probe-Activated Dynamic FFN {largest:.3g}." in (run / "report.md").read_text()
    assert f"{largest:.3g}." in (run / "report.html").read_text()
    assert "fidelity, not correctness" in (run / "report.md").read_text()
    (run / "ranking.json").unlink()
    assert rank(arguments) == 0
    assert written == {name: (run / name).read_bytes() for name in written}


def test_a_run_ends_with_the_best_plan_under_a_budget(finished: Path, cache: Path, tmp_path: Path) -> None:
    """The one of README; here the finished run goes on with another budget."""
    output = shutil.copytree(finished, tmp_path / "run")
    budget = ["--budget=flops=80%", "--joint.milestones=0.1", "--joint.ffn_levels=skip", "--joint.attention_levels=skip"]
    chosen = [option for option in options(cache, output) if "budget" not in option]
    assert rank([*chosen, *budget]) == 0
    front = json.loads((output / "front.json").read_text())
    assert {point["kind"] for point in front["points"]} >= {"dense", "joint", "attention", "ffn", "both"}
    published = read_plan(output / "plan.json").plan
    assert published.reduced("attention") | published.reduced("ffn")
    assert "flops=80%" in (output / "report.html").read_text()


def test_examples_are_answered_twice(finished: Path) -> None:
    examples = json.loads((finished / "examples.json").read_text())["examples"]
    assert len(examples) == 6
    assert len({example["dataset"] for example in examples}) == 3
    assert all(example["dense"]["text"] and example["images"] for example in examples)
    # The embedded model is right nearly always.
    assert sum(example["dense"]["score"] for example in examples) >= 4


def test_prefill_times_have_their_baseline(finished: Path) -> None:
    prefill = json.loads((finished / "timing.json").read_text())["prefill"]
    assert prefill.keys() == {"attention", "ffn", "both"}
    for times in prefill.values():
        assert len(times["dense"]) == len(times["reduced"]) == 1  # as many as --report.timing_repeats
        assert min(*times["dense"], *times["reduced"]) > 0


def record_of(process: subprocess.Popen[str], journal: Path) -> None:
    """Wait until the process has written a record: an interruption during its imports would try nothing."""
    records = journal.read_bytes().count(b"\n") if journal.exists() else 0
    while not (journal.exists() and journal.read_bytes().count(b"\n") > max(records, 1)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_killed_at_random_moments_stopped_and_restarted(
    finished: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two kills, Ctrl-C, and a torn last line: the results are those of a run without interruptions."""
    output, rng = tmp_path / "run", random.Random(11)
    journal, arguments = output / "journal.jsonl", options(cache, output)
    for _ in range(2):
        process = started(arguments)
        record_of(process, journal)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (output / "ranking.json").exists():
            read_run(output)  # what was found before the kill is valid
    process = started(arguments)
    record_of(process, journal)
    process.send_signal(signal.SIGSTOP)  # it keeps the folder until it goes on
    capsys.readouterr()
    try:
        assert rank(arguments) == 2
    finally:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
    (refusal,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "another run is using" in refusal
    _, message = process.communicate()
    assert process.returncode == 130, message
    assert "Traceback" not in message
    journal.write_bytes(journal.read_bytes()[:-7])
    assert rank(arguments) == 0
    assert "journal.jsonl" in capsys.readouterr().err
    assert (output / "ranking.json").read_bytes() == (finished / "ranking.json").read_bytes()
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    done = Counter((r["split"], *map(tuple, (r["attention"], r["ffn"])), sample) for r in lines for sample in r["samples"])
    assert max(done.values()) == 1
    validation = {(split, *plan) for split, *plan, _ in done if split == "validation"}
    assert len(validation) == 2 * EVALUATIONS - 1  # the dense plan is evaluated once for both operators


def test_a_restart_compiles_and_evaluates_nothing(finished: Path, cache: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "again")
    process = started(options(cache, output))
    _, message = process.communicate()
    assert process.returncode == 0, message
    timing = json.loads((output / "timing.json").read_text())
    assert timing["compilations"] == 0
    assert timing["evaluations"] == 0


def test_a_journal_of_another_configuration_is_refused(finished: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written() -> dict[str, bytes]:  # the lock has the number of its last process
        return {path.name: path.read_bytes() for path in finished.iterdir() if path.name != "journal.lock"}

    before = written()
    assert rank([*options(cache, finished), "--reduction.attention_range=7"]) == 2
    message = capsys.readouterr().err
    assert "reduction.attention_range was 16, is 7" in message
    assert written() == before


def write_rows(folder: Path, rows: Sequence[object]) -> Path:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_data(cache: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 128, 3), np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(
            {
                "image": f"{number}.png",
                "question": "digit at row 1 column 1 ?",
                "answers": [str(d) for d in range(10)],
                "dataset": "noise",
            }
        )
    data = write_rows(tmp_path, rows)
    assert rank([*options(cache, tmp_path / "out"), f"--data={data}", "--search.operators=ffn", "--report=none"]) == 0
    assert json.loads((tmp_path / "out" / "ranking.json").read_text())["rankings"]["ffn"]


def bad_image(folder: Path) -> list[str]:
    (folder / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (128, 64)).save(folder / "small.png")
    return [f"--data={write_rows(folder, [_row('bad.png'), _row('small.png')])}"]


def huge_image(folder: Path) -> list[str]:
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    Image.new("RGB", (128, 64)).save(folder / "small.png")
    return [f"--data={write_rows(folder, [_row('huge.png'), _row('small.png')])}"]


def one_row(row: dict[str, object]) -> object:
    def write(folder: Path) -> list[str]:
        Image.new("RGB", (96, 96)).save(folder / "a.png")
        return [f"--data={write_rows(folder, [row])}"]

    return write


def no_rows(folder: Path) -> list[str]:
    return [f"--data={write_rows(folder, [])}"]


def unknown_field(folder: Path) -> list[str]:
    (folder / "c.yaml").write_text("reduction:\n  atention_range: 3\n")
    return [f"--config={folder / 'c.yaml'}"]


def output_is_a_file(folder: Path) -> list[str]:
    (folder / "out").write_text("")
    return []


def _row(image: str) -> dict[str, object]:
    return {"image": image, "question": "digit at row 1 column 1 ?", "answer": "7", "dataset": "d"}


BAD = {
    "missing model": (lambda _: ["--model=nowhere/at-all"], "no such folder"),
    "misspelt model": (lambda _: ["--model=embeded"], "did you mean 'embedded'"),
    "unknown field": (unknown_field, "attention_range"),
    "unknown option": (lambda _: ["--search.penaltee=2"], "search.penalty"),
    "wrong type": (lambda _: ["--compute.batch_size=many"], "compute.batch_size"),
    "negative range": (lambda _: ["--reduction.attention_range=-1"], "reduction.attention_range"),
    "fraction above one": (lambda _: ["--reduction.active_fraction=1.5"], "reduction.active_fraction"),
    "layer 99": (lambda _: ["--search.operators=ffn", "--search.base_attention=99"], "layer 99"),
    "output is a file": (output_is_a_file, "out"),
    "unreadable image": (bad_image, "bad.png is not an image"),
    "absurd image": (huge_image, "400000000 pixels"),
    "empty dataset": (no_rows, "empty"),
    "no image": (one_row({"question": "what ?", "answer": "7"}), "own.jsonl:1"),
    "no answer": (one_row({"image": "a.png", "question": "what ?"}), "own.jsonl:1"),
    "a kernel that no CPU has": (lambda _: ["--compute.ffn_path=kernel"], "the FFN path kernel needs a TPU"),
    "too small a bucket": (lambda _: ["--compute.text_slots=8"], "compute.text_slots"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = BAD[case]
    extra = make(tmp_path)
    output = tmp_path / "out"
    assert rank([*options(cache, output), *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert not (output / "ranking.json").exists()


def test_a_run_can_end_with_its_rankings(finished: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert rank([*options(cache, output), "--report=none", "--profile"]) == 0
    names = {"ranking.json", "timing.json", "config.yaml", "profile.json", "journal.jsonl", "journal.lock"}
    assert {path.name for path in output.iterdir()} == names
    whole, early = (json.loads((folder / "ranking.json").read_text()) for folder in (finished, output))
    assert early["rankings"] == whole["rankings"]
    assert early["search"] == whole["search"]
    assert "held_out" not in early
    programs = {item["program"]: item for item in json.loads((output / "profile.json").read_text())["programs"]}
    assert {"encode", "layers", "outcome"} <= programs.keys()
    assert programs["encode"]["flops"] > 1e6 and programs["layers"]["flops"] is None


def test_progress_counts_to_its_end(finished: Path) -> None:
    lines = (finished.parent / "terminal").read_text(encoding="utf-8").splitlines()
    for label in ("ranking attention", "ranking ffn", "held-out curves"):
        last = [line for line in lines if line.startswith(f"{label}: ")][-1]
        done, total = last.split(": ")[1].split()[0].split("/")
        assert done == total, last
