"""The evaluation as a person runs it: scores, files for another harness, kills and restarts, folders of other runs."""

import base64
import csv
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

from rlens_jax.commands.evaluate import main
from rlens_jax.commands.options import find_decoder
from rlens_jax.console import run_command
from rlens_jax.data.pages import make_page
from rlens_jax.evaluation import answers as answers_module
from rlens_jax.evaluation.answers import FILE_NAME, Answers
from rlens_jax.flops import prefill_summary
from rlens_jax.plan_file import FORMAT, read_plan
from rlens_jax.reporting.evaluation_report import evaluation_page
from tests.data.benchmarks.files import benchmark_rows, five_rows, md5_of, write_tsv

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

SCHEMA = json.loads((Path(answers_module.__file__).parent / "evaluation.schema.json").read_text())
PAGES, QUESTIONS = 2, 12
CELLS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
"""The row and column of the digit that a question is about."""


def png(rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """A page, and its digits."""
    page, buffer = make_page(rng, "test", augment=False), io.BytesIO()
    Image.fromarray(page.pixels).save(buffer, "PNG")
    return buffer.getvalue(), page.digits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions the model was trained for about each of two images of equal names, and three rows of a benchmark."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(5)
    rows, cells, pages = [], [], [png(rng) for _ in range(PAGES)]
    for number, (image, _) in enumerate(pages):
        (folder / str(number)).mkdir()
        (folder / str(number) / "page.png").write_bytes(image)
    for number in range(QUESTIONS):
        image, digits = pages[number % PAGES]
        row, column = CELLS[number // PAGES]
        question = f"digit at row {row + 1} column {column + 1} ?"
        # The fourth has a reference answer that the model will not give.
        answer = "red" if number == 3 else str(digits[row, column])
        rows.append({"image": f"{number % PAGES}/page.png", "question": question, "answer": answer, "dataset": "digits"})
    for number in range(3):
        code = base64.b64encode(png(rng)[0]).decode()
        options = ["red", "green", "blue", 'the "black" ink']
        cells.append([str(7 * number), "digit at row 1 column 1 ?", *options, "A", "coarse", "fine", code])
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "MMStar.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "question", *"ABCD", "answer", "category", "l2_category", "image"])
        writer.writerows(cells)
    return folder


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"format": FORMAT, "attention": [9, 10, 11], "ffn": list(range(12)), "active_fraction": 0.02}
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    path.write_text(json.dumps(fields))
    return path


def arguments(data: Path, plan: Path, output: Path, *more: str) -> list[str]:
    md5 = hashlib.md5((data / "MMStar.tsv").read_bytes()).hexdigest()
    sources = [str(data / "own.jsonl"), str(data / "MMStar.tsv")]
    settings = ("--batch-size=8", "--max-new-tokens=3", "--bootstrap-samples=50", "--timing-repeats=0", "--baseline")
    return [
        "embedded", f"--plan={plan}", f"--output={output}", f"--md5=MMStar={md5}", *settings, *more, "--data", *sources
    ]  # fmt: skip


def evaluate(arguments: Sequence[str]) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=arguments)
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def finished(data: Path, plan_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation that nothing disturbed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert evaluate(arguments(data, plan_path, output, "--timing-repeats=1")) == 0
    return output


def predictions(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def results(folder: Path) -> dict[str, bytes]:
    """All that an evaluation decides: predictions and evaluation.json."""
    files = [folder / "evaluation.json", *sorted(folder.glob("*/*.tsv"))]
    assert len(files) == 5
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_scores_costs_and_predictions(finished: Path, data: Path, plan_path: Path) -> None:
    result = json.loads((finished / "evaluation.json").read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(result, SCHEMA)
    own = result["datasets"]["digits"]
    references = [json.loads(line)["answer"] for line in (data / "own.jsonl").read_text().splitlines()]
    values = {}
    for variant, part in own["variants"].items():
        rows = predictions(finished / part["predictions"])
        assert [row["index"] for row in rows] == [f"own.jsonl:{number}" for number in range(1, QUESTIONS + 1)]
        right = [row["prediction"] == reference for row, reference in zip(rows, references, strict=True)]
        values[variant] = part["score"]["value"]
        assert values[variant] == pytest.approx(100 * sum(right) / QUESTIONS)
        assert part["score"]["low"] <= values[variant] <= part["score"]["high"]
        assert part["unended"] == 0
    assert values["dense"] >= 60  # it can read, but is never right at the fourth question
    assert values["plan"] < values["dense"] < 100
    difference = own["difference"]
    assert difference["value"] == pytest.approx(values["plan"] - values["dense"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert difference["low"] < 0
    decoder, plan = find_decoder("embedded"), read_plan(plan_path)
    num_layers, sizes = decoder.num_layers, decoder.layer_sizes
    # Every question has as many tokens.
    tokens = (int(own["text_tokens"]), int(own["visual_tokens"]))
    counted = prefill_summary(sizes, num_layers, *tokens, plan.plan, plan.reduction, plan.pruning)
    assert own["multiply_adds"]["saved"] == pytest.approx(1 - counted["without_probes"]["share_of_dense"])
    assert own["multiply_adds"]["saved_with_probes"] == pytest.approx(1 - counted["with_probes"]["share_of_dense"])


def test_questions_about_one_image_share_its_prefill(finished: Path, data: Path, plan_path: Path, tmp_path: Path) -> None:
    """The answers are those of each question alone, for less than a third of the multiply-adds."""
    output = tmp_path / "run"
    left_out = ("--md5", "--baseline", str(data / "MMStar.tsv"))
    given = [option for option in arguments(data, plan_path, output, "--no-sharing") if not option.startswith(left_out)]
    assert evaluate(given) == 0
    assert predictions(output / "plan" / "digits.tsv") == predictions(finished / "plan" / "digits.tsv")
    alone, shared = (
        json.loads((folder / "evaluation.json").read_text())["datasets"]["digits"]["multiply_adds"]
        for folder in (output, finished)
    )
    for name in ("dense", "reduced", "reduced_with_probes"):
        assert shared["shared"][name] < 0.3 * shared[name]
        assert alone["shared"][name] == pytest.approx(alone[name])
        assert alone[name] == shared[name]
    part = json.loads((finished / "evaluation.json").read_text())["datasets"]
    assert (part["digits"]["questions_per_image"], part["MMStar"]["questions_per_image"]) == (6, 1)
    assert part["MMStar"]["multiply_adds"]["shared"]["dense"] == pytest.approx(part["MMStar"]["multiply_adds"]["dense"])


def test_a_benchmark_has_the_columns_of_its_file(finished: Path) -> None:
    rows = predictions(finished / "plan" / "MMStar.tsv")
    assert [row["index"] for row in rows] == ["0", "7", "14"]
    assert rows[0]["D"] == 'the "black" ink'
    assert {"question", "answer", "category", "prediction"} < rows[0].keys()
    assert "image" not in rows[0]
    part = json.loads((finished / "evaluation.json").read_text())["datasets"]["MMStar"]
    assert part["variants"]["plan"]["score"]["harness"].startswith("VLMEvalKit rules")
    assert part["images"] == {"upright": False, "transparency": "dropped"}


def test_five_rows_of_pope_and_mmbench(tmp_path: Path) -> None:
    """Read, asked, answered and scored; the embedded model knows neither."""
    chosen = ("POPE", "MMBench_DEV_EN")
    rng, sources, sums = np.random.default_rng(9), [], []
    image = base64.b64encode(png(rng)[0]).decode()
    for name in chosen:
        rows = [row | {"image": image} for row in five_rows(name)]
        path = write_tsv(tmp_path / f"{name}.tsv", rows)
        sources.append(str(path))
        sums.append(f"--md5={name}={md5_of(path)}")
    options = (
        "--max-new-tokens=1",
        "--bootstrap-samples=20",
        "--timing-repeats=0",
        "--rules=2025-01",
        "--images=recompressed",
        "--profile=vlmevalkit@e8e78f05",
        "--min-pixels=6400",
        "--system=Look.",
        f"--output={tmp_path / 'run'}",
    )
    assert evaluate(["embedded", *options, *sums, "--data", *sources]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    jsonschema.validate(result, SCHEMA)
    given = {name: result["configuration"][name] for name in ("rules", "images", "profile", "min_pixels", "max_pixels")}
    assert list(given.values()) == ["2025-01", "recompressed", "vlmevalkit@e8e78f05", 6400, None]
    for name, part in result["datasets"].items():
        assert part["questions"] == 5
        assert part["digest"].endswith(", images recompressed")
        asked = part["asked"]
        assert asked["limits"] == {"min_pixels": 6400, "max_pixels": 12845056}
        assert (asked["max_new_tokens"], asked["repetition_penalty"], asked["system"]) == (1, 1.0, "Look.")
        assert (asked["entry"], asked["not_reproduced"]) == ("Qwen2-VL-2B, 7B and 72B Instruct", [])
        assert asked["prompt"].startswith("{question} Please" if name == "POPE" else "Question: {question}")
        scored = part["variants"]["plan"]["score"]
        assert scored["harness"].startswith("VLMEvalKit rules of 2025-01")
        assert 0 <= scored["low"] <= scored["value"] <= scored["high"] <= 100, name
        assert len(predictions(tmp_path / "run" / "plan" / f"{name}.tsv")) == 5
    assert tuple(result["datasets"]) == chosen


def test_times_have_their_baseline(finished: Path) -> None:
    times = json.loads((finished / "timing.json").read_text())
    for variant in ("dense", "plan"):
        for name in ("prefill", "first_token", "decode"):
            assert len(times[variant][name]) == 1
            assert times[variant][name][0] > 0
        assert times[variant]["tokens_per_second"] == 8 * 31 / times[variant]["decode"][0]
    assert (times["rows"], times["branches"], times["prompts"]) == (1, 8, 6)


def test_the_report_shows_scores_costs_and_times(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    result, times = (json.loads((finished / name).read_text()) for name in ("evaluation.json", "timing.json"))
    own = result["datasets"]["digits"]
    shown = [own["variants"][variant]["score"] for variant in ("dense", "plan")]
    for score in shown:
        assert f"{score['value']:.2f} ({score['low']:.2f} to {score['high']:.2f})" in page
    assert f"{own['difference']['value']:+.2f} (" in page
    assert f"{100 * own['multiply_adds']['saved']:.1f}" in page
    for variant in ("dense", "plan"):
        assert f"{1e3 * times[variant]['prefill'][0]:.1f} (" in page
    for name in result["datasets"]:
        assert f'<th scope="row">{name}</th>' in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def test_the_report_says_what_was_not_asked_as_published(finished: Path) -> None:
    """Also where nothing was timed, answers are withheld, and names have the characters of HTML."""
    result = json.loads((finished / "evaluation.json").read_text())
    own = result["datasets"].pop("digits")
    own["asked"]["not_reproduced"] = ["beams"]
    own["variants"]["plan"] |= {"score": None, "unended": 3}
    own |= {"unusable": 2, "difference": None}
    result["model"]["not_applied"] = ["num_beams 3"]
    result["datasets"] = {"<b>": own}
    page = evaluation_page(result, None)
    for sentence in (
        "what the checkpoint asks for: num_beams 3.",
        "&lt;b&gt; is not asked as in",
        "beams.",
        "2 questions could not",
    ):
        assert sentence in page
    assert "3 answers of plan were cut off" in page
    assert "answers withheld" in page
    assert "<b>" not in page
    assert "Measured times" not in page


def test_interrupted_anywhere_and_resumed(
    finished: Path, data: Path, plan_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, append = tmp_path / "run", Answers.append
    stops = [0, 1, 1, 3]

    def stop_later(self, answers):
        if stops[0] == 0:
            raise KeyboardInterrupt
        stops[0] -= 1
        append(self, answers)

    monkeypatch.setattr(Answers, "append", stop_later)
    while len(stops) > 1:
        assert evaluate(arguments(data, plan_path, output)) == 130
        # What a power cut leaves: half a batch, and a torn line.
        if (output / FILE_NAME).exists():  # a run without an answer leaves none
            lines = (output / FILE_NAME).read_bytes().splitlines(keepends=True)
            kept = lines[:-1] if len(lines) > 2 else lines
            (output / FILE_NAME).write_bytes(b"".join([*kept, b'{"variant": "pl']))
        del stops[0]
    monkeypatch.undo()
    assert not (output / "evaluation.json").exists()
    assert evaluate(arguments(data, plan_path, output)) == 0
    assert results(output) == results(finished)
    # Once more, nothing is left to answer.
    log = (output / FILE_NAME).read_bytes()
    assert evaluate(arguments(data, plan_path, output)) == 0
    assert (output / FILE_NAME).read_bytes() == log


def test_killed_and_resumed(finished: Path, data: Path, plan_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "rlens_jax.evaluate", *arguments(data, plan_path, output)]
    log, errors = output / FILE_NAME, tmp_path / "errors"
    with errors.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 1):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert log.exists(), errors.read_text()
    assert evaluate(arguments(data, plan_path, output)) == 0
    assert results(output) == results(finished)


@pytest.mark.parametrize("changed", ["model_hash", "plan.ffn"])
def test_the_folder_of_another_evaluation(
    finished: Path, data: Path, plan_path: Path, tmp_path: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    given = arguments(data, plan_path, output)
    if changed == "model_hash":
        header, rest = (output / FILE_NAME).read_bytes().split(b"\n", 1)
        fields = json.loads(header)
        fields["fingerprint"]["model_hash"] = "0" * 64
        (output / FILE_NAME).write_bytes(json.dumps(fields).encode() + b"\n" + rest)
    else:
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**json.loads(plan_path.read_text()), "ffn": [4]}))
        given = arguments(data, other, output)
    assert evaluate(given) == 2
    assert f"belongs to a run of another configuration: {changed} was" in capsys.readouterr().err
    assert results(output) == results(finished)


def test_rows_come_and_go(
    finished: Path, data: Path, plan_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers to unchanged questions are kept at whatever place; a row that cannot be used ends the run or is wrong."""
    output, log = tmp_path / "run", (finished / FILE_NAME).read_bytes()
    shutil.copytree(finished, output)
    (data / "broken.png").write_bytes((data / "0" / "page.png").read_bytes()[:100])
    rows = [json.loads(line) for line in (data / "own.jsonl").read_text().splitlines()]
    broken = {"image": "broken.png", "question": "digit ?", "answer": "7", "dataset": "digits"}
    changed = [broken, *rows[:1], *rows[3:], {**rows[1], "answer": "9"}, rows[4]]
    (data / "changed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    given = [part.replace("own.jsonl", "changed.jsonl") for part in arguments(data, plan_path, output)]
    assert evaluate(given) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: changed.jsonl:1: image ") and "broken.png cannot be decoded" in message
    assert message.endswith("; with --skip-unusable such questions are not asked and count as wrong")
    assert evaluate([*given, "--skip-unusable"]) == 0
    assert "counted as wrong: changed.jsonl:1: image" in capsys.readouterr().err
    assert (output / FILE_NAME).read_bytes() == log
    result = json.loads((output / "evaluation.json").read_text())
    jsonschema.validate(result, SCHEMA)
    part = result["datasets"]["digits"]
    assert (part["questions"], part["unusable"], part["images"]) == (QUESTIONS + 1, 1, {"upright": True, "transparency": "white"})
    texts = [row["prediction"] for row in predictions(output / "plan" / "digits.tsv")]
    before = [row["prediction"] for row in predictions(finished / "plan" / "digits.tsv")]
    assert texts == ["", before[0], *before[3:], before[1], before[4]]
    right = sum(text == row["answer"] for text, row in zip(texts, changed, strict=True))
    assert part["variants"]["plan"]["score"]["value"] == pytest.approx(100 * right / (QUESTIONS + 1))


def test_what_has_no_score_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MME's score needs all categories, which the first questions do not have."""
    path, output = write_tsv(tmp_path / "MME.tsv", benchmark_rows("MME", 4)), tmp_path / "run"
    given = ["embedded", f"--output={output}", f"--md5=MME={md5_of(path)}", "--limit=3", "--data", str(path)]
    assert evaluate(given) == 2
    assert "error: MME: no rows of artwork" in (message := capsys.readouterr().err)
    assert "; --limit 3 takes the first questions only, leave it out or raise it" in message
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("n" * 300, "has at most 200 bytes, this one 300"),
        ("\N{SNOWMAN}" * 70, "has at most 200 bytes, this one 210"),
        ("../up", "must not begin with a dot or contain a /"),
        ("a\tb", "must not begin with a dot or contain a / or a control character"),
    ],
)
def test_names_that_are_no_file_names(name: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"not looked at")
    row = {"image": "a.png", "question": "what ?", "answer": "7", "dataset": name}
    (tmp_path / "my.jsonl").write_text(json.dumps(row))
    assert evaluate(["embedded", f"--output={tmp_path / 'run'}", "--data", str(tmp_path / "my.jsonl")]) == 2
    message = capsys.readouterr().err
    assert complaint in message and len(message) < 500
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--bseline"], "did you mean '--baseline'"),
        (["--data", "pagess"], "--data pagess: is neither 'pages' nor a .tsv or .jsonl file"),
        (["--data", "MMSta.tsv"], "did you mean 'MMStar'"),
        (["--data", "none/MMStar.tsv"], "no such file"),
        (["--batch-size=0"], "--batch-size must be at least 1, not 0"),
        (["--md5=MMStar=1"], "must be NAME=SUM"),
        (["--profile=vlmevalkit"], "--profile vlmevalkit: there is no such profile (did you mean 'vlmevalkit@e8e78f05'?)"),
        (["--limit=1", "--max-tiles=6"], "max_tiles: a model of the type qwen2_vl has no such setting; it has min_pixels"),
        (["--limit=1", "--min-pixels=10000", "--max-pixels=999"], "with min_pixels 10000 with max_pixels 999: size must be"),
        (["--min-pixels=0"], "--min-pixels must be at least 1, not 0"),
        (["--repetition-penalty=0"], "--repetition-penalty must be a positive number, not 0.0"),
        (["--first=ffn=2"], "--first needs a --plan"),
        (["--rules=2025-02"], "--rules 2025-02: there are no such rules (did you mean '2025-01'?); known: 2026-08, 2025-01"),
        (["--data", "LMUData/MMVet.tsv"], "MMVet cannot be scored here: only a judge model (gpt-4-turbo) scores its answers"),
    ],
)
def test_bad_options(options: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(["embedded", f"--output={tmp_path / 'run'}", *options]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
