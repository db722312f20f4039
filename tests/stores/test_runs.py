"""Commands whose model, data and output are on a store: the results of a local run, also after kills; failures in one line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlens_jax.data.page_samples import read_pages
from rlens_jax.resources import embedded_model
from tests.stores.fake_store import FakeStore

pytestmark = pytest.mark.slow

RANK = (
    "--config=embedded",
    "--data.validation_samples=2",
    "--data.confirmation_samples=0",
    "--data.test_samples=2",
    "--search.position_layers=6",
    "--search.operators=ffn",
    "--joint.budget=null",
    "--report.extent=none",
    "--compute.cpu_devices=1",
    "--compute.text_slots=null",
    "--compute.visual_slots=null",
)
EVALUATE = ("--limit=5", "--batch-size=1", "--no-sharing", "--timing-repeats=0", "--bootstrap-samples=20", "--max-new-tokens=2")


class Commands:
    """Starts commands with the store and a cache folder; see `tests.stores.forked`."""

    def __init__(self, store: FakeStore, folder: Path):
        self.cache, self._errors = folder / "cache", folder / "stderr"
        environment = {**os.environ, **store.environment, "XDG_CACHE_HOME": str(self.cache), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "tests.stores.forked"]
        pipe = subprocess.PIPE
        self.parent = subprocess.Popen(
            command, env=environment, cwd=Path(__file__).parents[2], stdin=pipe, stdout=pipe, text=True
        )

    def start(self, *arguments: object) -> int:
        """Start a command; its process's number."""
        assert self.parent.stdin and self.parent.stdout
        self.parent.stdin.write(json.dumps([str(self._errors), *map(str, arguments)]) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def end(self) -> tuple[int, str]:
        """The exit code of the command, negative for a signal, and what it printed."""
        assert self.parent.stdout
        return int(self.parent.stdout.readline()), self._errors.read_text()

    def run(self, *arguments: object) -> str:
        """What a command printed, which must succeed."""
        self.start(*arguments)
        code, said = self.end()
        assert code == 0, said
        return said

    def refused(self, *arguments: object) -> str:
        """The one line with which a command refuses."""
        self.start(*arguments)
        code, said = self.end()
        assert code == 2, said
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert "Traceback" not in said
        return line

    def forget(self) -> None:
        """Delete the local copies, as if the next command ran on another machine."""
        shutil.rmtree(self.cache / "rlens_jax" / "stores")


@pytest.fixture(scope="module")
def commands(running: FakeStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    running.reset()
    commands = Commands(running, tmp_path_factory.mktemp("commands"))
    yield commands
    commands.parent.kill()
    commands.parent.communicate()
    running.reset()


@pytest.fixture(scope="module")
def data(running: FakeStore, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pages.jsonl and its images, which is also gs://bucket/data; gs://bucket/model has the embedded model."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for number, sample in enumerate(read_pages("validation", 6)["pages_yesno"]):
        (folder / f"{number}.png").write_bytes(sample.images[0])
        row = {"image": f"{number}.png", "question": sample.question, "answers": sample.answers, "dataset": "yesno"}
        lines.append(json.dumps(row))
    (folder / "pages.jsonl").write_text("\n".join(lines))
    for source, target in ((folder, "data"), (embedded_model(), "model")):
        for path in source.iterdir():
            running.put(f"bucket/{target}/{path.name}", path.read_bytes())
    return folder


def saved(store: FakeStore, prefix: str, folder: Path) -> Path:
    """A local copy of what the store has under bucket/`prefix`."""
    for name in store.names(f"bucket/{prefix}/"):
        path = folder / name.removeprefix("bucket/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.objects[name][0])
    return folder / prefix


def killed(store: FakeStore, commands: Commands, kills: int, prefix: str, most: int, *arguments: object) -> int:
    """Kill a command soon after it wrote a random number of objects, at most `most`, of this prefix; then let it end."""
    rng = random.Random(str(arguments))
    for number in range(kills):
        # Held, so that a busy machine does not let the command end first.
        store.hold_after(f"bucket/{prefix}", rng.randint(1, most))
        process = commands.start(*arguments)
        while not store.holds:
            time.sleep(0.002)
            assert os.path.exists(f"/proc/{process}/fd/2"), commands.end()  # noqa: PTH110 - other paths of a dead child remain
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        code, said = commands.end()
        store.drop_held()
        assert code == -signal.SIGKILL, said
        if number % 2:
            commands.forget()
    commands.run(*arguments)
    return kills


def test_killed_ten_times_on_a_store(running: FakeStore, commands: Commands, data: Path, tmp_path: Path) -> None:
    """Convert, rank, and evaluate what was converted. The local copies are deleted after some of the kills."""
    kills = killed(running, commands, 5, "converted/", 20, "convert", "gs://bucket/model", "gs://bucket/converted")
    assert not running.names("bucket/converted/.unfinished")
    model = saved(running, "converted", tmp_path)
    commands.run("convert", embedded_model(), tmp_path / "local")
    ours, theirs = (json.loads((folder / "conversion.json").read_text()) for folder in (tmp_path / "local", model))
    assert {**theirs, "source": None} == {**ours, "source": None}  # with the checksum of every leaf

    pages = data / "pages.jsonl"
    commands.run("rank", *RANK, f"--model={embedded_model()}", f"--data={pages}", f"--output={tmp_path / 'rank'}")
    kills += killed(
        running, commands, 3, "runs/rank/journal.parts/", 5, "rank", *RANK, "--model=gs://bucket/model",
        "--data=gs://bucket/data/pages.jsonl", "--output=gs://bucket/runs/rank",
    )  # fmt: skip
    local, remote = tmp_path / "rank", saved(running, "runs/rank", tmp_path)
    named = (remote / "ranking.json").read_text().replace("gs://bucket/data", str(data))
    assert named.replace("gs://bucket/model", str(embedded_model())) == (local / "ranking.json").read_text()
    assert not list(remote.glob("*.lock/*"))
    commands.run("report", "gs://bucket/runs/rank", "--output=gs://bucket/reports")
    commands.run("report", remote, f"--output={tmp_path}")
    assert running.objects["bucket/reports/report.html"][0] == (tmp_path / "report.html").read_bytes()

    plan = tmp_path / "plan.json"
    plan.write_text('{"format": "rlens-plan/1", "ffn": [10, 11]}')
    running.put("bucket/plan.json", plan.read_bytes())
    commands.run("evaluate", model, *EVALUATE, f"--plan={plan}", "--data", pages, f"--output={tmp_path / 'scores'}")
    kills += killed(
        running, commands, 2, "runs/scores/answers.parts/", 2, "evaluate", "gs://bucket/converted", *EVALUATE, "--plan=gs://bucket/plan.json",
        "--data=gs://bucket/data/pages.jsonl", "--output=gs://bucket/runs/scores",
    )  # fmt: skip
    local, remote = tmp_path / "scores", saved(running, "runs/scores", tmp_path)
    for path in (local / "plan").iterdir():
        assert (remote / "plan" / path.name).read_bytes() == path.read_bytes()
    found, expected = (json.loads((folder / "evaluation.json").read_text()) for folder in (remote, local))
    assert found["datasets"] == expected["datasets"] and found["model"]["hash"] == expected["model"]["hash"]
    assert kills == 10


def test_the_compilation_cache_is_on_the_store(running: FakeStore, tmp_path: Path) -> None:
    """A second process compiles nothing."""
    code = (
        "from rlens_jax import mirrors; from rlens_jax.engine.startup import start_jax;"
        "counter = start_jax('highest', mirrors.place('gs://bucket/compiled'));"
        "import jax; jax.jit(lambda x: 3 * x)(2.0); print(counter.compiled)"
    )
    environment = {**os.environ, **running.environment}
    for compiled in (1, 0):
        done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == f"{compiled}\n", done.stderr
    assert any(name.endswith("-cache") for name in running.names("bucket/compiled/"))
    assert not any(tmp_path.iterdir())


def test_a_store_that_fails_every_tenth_request(running: FakeStore, commands: Commands, data: Path, tmp_path: Path) -> None:
    running.fail_every = 10
    try:
        commands.run("convert", "gs://bucket/model", "gs://bucket/flaky")
    finally:
        running.fail_every = 0
    assert "bucket/flaky/conversion.json" in running.objects and not running.names("bucket/flaky/.unfinished")


def test_no_permission_on_the_store(running: FakeStore, commands: Commands, data: Path, tmp_path: Path) -> None:
    pages, model = f"--data={data / 'pages.jsonl'}", f"--model={embedded_model()}"
    running.deny = True
    try:
        for address, arguments in {
            "gs://bucket/none": ("convert", "gs://bucket/none", tmp_path / "new"),
            "gs://bucket/out": ("rank", *RANK, model, pages, "--output=gs://bucket/out"),
            "gs://bucket/d.jsonl": ("evaluate", embedded_model(), "--data=gs://bucket/d.jsonl", f"--output={tmp_path}"),
            "gs://bucket/p.json": ("evaluate", embedded_model(), "--plan=gs://bucket/p.json", pages),
            "gs://bucket/cache": (
                "rank", *RANK, model, pages, f"--output={tmp_path}", "--compute.compilation_cache=gs://bucket/cache",
            ),
        }.items():  # fmt: skip
            line = commands.refused(*arguments)
            assert line.startswith(f"error: {address}") and "no permission on the store" in line and "sign in" in line
    finally:
        running.deny = False
    assert not (tmp_path / "new").exists() and not running.names("bucket/out")
    assert not Path("gs:").exists()
