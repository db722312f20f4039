"""The scripts for slices and clusters, against a stand-in for the cloud's commands that records how it is called.

What a TPU VM would run is run here for real, with a stand-in for its Python.
"""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "tpu_scripts"
COMMANDS = sorted(path.name for path in FOLDER.glob("*.sh"))
ALL_FILES = [*FOLDER.glob("*.sh"), *FOLDER.glob("lib/*.sh")]

STAND_IN = r"""#!/usr/bin/env bash
# Records the call; answers with the first answer not yet used whose first line is a part of the call.
printf '%s\0' "$#" "${0##*/}" "$@" >>"$STAND_IN/calls"
for answer in "$STAND_IN"/answers/*; do
    [[ -e $answer ]] || continue
    mapfile -t lines <"$answer"
    [[ "${0##*/} $*" == *"${lines[0]}"* ]] || continue
    command -p rm "$answer"
    printf '%s\n' "${lines[@]:2}"
    exit "${lines[1]}"
done
"""

SLICE = ["--project=P", "--zone=Z"]
SETTINGS = {
    "project": "P",
    "zone": "Z",
    "name": "N",
    "accelerator-type": "v5litepod-16",
    "runtime-version": "R",
}
SETTINGS |= {
    "cluster": "C",
    "bucket": "B",
    "workload": "w",
    "config": "embedded",
    "output": "/mnt/runs",
    "to": "out",
}
NEEDS = {
    "create.sh": "project zone name accelerator-type runtime-version",
    "install.sh": "project zone name",
    "launch.sh": "project zone name config",
    "watch.sh": "project zone name",
    "resume.sh": "project zone name accelerator-type runtime-version config",
    "fetch.sh": "project output to zone name",
    "delete.sh": "project zone name",
    "batch.sh": "project zone name accelerator-type runtime-version output",
    "gke_create.sh": "project zone cluster accelerator-type bucket",
    "gke_launch.sh": "project zone cluster accelerator-type workload config",
    "gke_watch.sh": "project zone cluster workload",
    "gke_delete.sh": "project zone cluster workload",
    "gke_batch.sh": "project zone cluster accelerator-type output",
}
"""What each script cannot do without."""
REST = {"batch.sh": ["--", "embedded"], "gke_batch.sh": ["--", "embedded"]}

DESCRIBE = [
    "gcloud",
    "compute",
    "tpus",
    "queued-resources",
    "describe",
    "N",
    *SLICE,
    "--format=value(state.state)",
]
DESCRIBE_NODE = ["gcloud", "compute", "tpus", "tpu-vm", "describe", "N", *SLICE, "--format=value(state)"]
DELETE = ["gcloud", "compute", "tpus", "queued-resources", "delete", "N", "--force", "--quiet", *SLICE]
ACTIVE = [("queued-resources describe", 0, "ACTIVE"), ("tpu-vm describe", 0, "READY")]
"""Answers of a slice that can be used."""


def create(*flags: str) -> list[str]:
    """The command that asks for a slice."""
    command = ["gcloud", "compute", "tpus", "queued-resources", "create", "N", "--node-id=N"]
    return [*command, "--accelerator-type=v5litepod-16", "--runtime-version=R", *flags, *SLICE]


def ssh(worker: str, command: str) -> list[str]:
    """A command on workers."""
    return [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "N",
        f"--worker={worker}",
        f"--command={command}",
        *SLICE,
    ]


def on_worker(worker: str, words: str) -> list[str]:
    """A command of the scripts' own on workers."""
    return ssh(worker, f"bash rlens_jax/source/tpu_scripts/lib/on_worker.sh {words}")


def scp(*files: str) -> list[str]:
    """Files to all workers."""
    return ["gcloud", "compute", "tpus", "tpu-vm", "scp", *files, "--worker=all", *SLICE]


def pack() -> list[list[str]]:
    """The source as one file."""
    archive = f"--output={REPOSITORY}/dist/rlens_jax.tar.gz"
    return [
        ["mkdir", "-p", f"{REPOSITORY}/dist"],
        ["git", "-C", str(REPOSITORY), "archive", "--format=tar.gz", "--prefix=source/", archive, "HEAD"],
    ]


def install() -> list[list[str]]:
    """All commands of an installation."""
    unpack = "mkdir -p rlens_jax && rm -rf rlens_jax/source && tar -xzf rlens_jax.tar.gz -C rlens_jax"
    copied = scp(f"{REPOSITORY}/dist/rlens_jax.tar.gz", "N:")
    return [*pack(), copied, ssh("all", unpack), on_worker("all", "install")]


def xpk(*words: str) -> list[str]:
    """A command of XPK's."""
    return ["xpk", *words, "--cluster=C", *SLICE]


@dataclass
class Cloud:
    """The stand-in: what it was asked, and what it will answer."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        (self.folder / "answers").mkdir()
        for name in ("gcloud", "xpk", "kubectl", "gsutil", "git", "tar", "mkdir", "rm", "cp"):
            path = self.folder / "bin" / name
            path.write_text(STAND_IN)
            path.chmod(0o755)

    def answer(self, *answers: tuple[str, int, str]) -> None:
        """Answers, each (a part of the command, exit code, output), used once and in this order."""
        for part, code, output in answers:
            number = len(list((self.folder / "answers").iterdir()))
            (self.folder / "answers" / f"{number:03}").write_text(f"{part}\n{code}\n{output}\n")

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RLENS_")}
        return kept | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "STAND_IN": str(self.folder),
            "RLENS_POLL_SECONDS": "0",
        }

    def calls(self) -> list[list[str]]:
        """The commands that were run, but for the question to git whether all is committed."""
        file = self.folder / "calls"
        words = iter(file.read_text().split("\0")[:-1] if file.exists() else [])
        calls = [[next(words) for _ in range(int(count) + 1)] for count in words]
        return [call for call in calls if call[0] != "git" or "diff" not in call]

    def run(self, script: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a script with only the arguments given."""
        command = [FOLDER / script, *arguments]
        return subprocess.run(
            command, env=self.environment | environment, cwd=self.folder, text=True, capture_output=True
        )

    def work(
        self, script: str, *arguments: str, without: Sequence[str] = ()
    ) -> "subprocess.CompletedProcess[str]":
        """Run a script with what it needs, and more."""
        needs = {name: SETTINGS[name] for name in NEEDS[script].split() if name not in without}
        return self.run(script, *(f"--{name}={value}" for name, value in needs.items()), *arguments)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_create_on_demand_and_spot(cloud: Cloud) -> None:
    cloud.answer(*ACTIVE, *ACTIVE)
    assert cloud.work("create.sh").returncode == 0
    assert cloud.calls() == [create(), DESCRIBE, DESCRIBE_NODE]
    extra = ["--spot", "--valid-until-duration", "6h", "--create-flags=--network=net --reserved"]
    assert cloud.work("create.sh", *extra).returncode == 0
    assert cloud.calls()[3] == create("--network=net", "--reserved", "--spot", "--valid-until-duration=6h")


def test_create_waits_until_the_slice_can_be_used(cloud: Cloud) -> None:
    waiting = [("queued-resources describe", 0, state) for state in ("WAITING_FOR_RESOURCES", "PROVISIONING")]
    cloud.answer(
        *waiting, ("queued-resources describe", 0, "ACTIVE"), ("tpu-vm describe", 0, "CREATING"), *ACTIVE
    )
    result = cloud.work("create.sh")
    assert result.returncode == 0
    assert cloud.calls()[1:] == [DESCRIBE, DESCRIBE, DESCRIBE, DESCRIBE_NODE, DESCRIBE, DESCRIBE_NODE]
    assert "N: PROVISIONING" in result.stderr


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_ends_when_the_slice_is_not_granted(cloud: Cloud, state: str) -> None:
    cloud.answer(("queued-resources describe", 0, state))
    result = cloud.work("create.sh")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: N was not granted or is lost; resume.sh")


def test_create_ends_when_it_is_refused(cloud: Cloud) -> None:
    cloud.answer(("queued-resources create", 1, ""))
    assert cloud.work("create.sh").returncode == 1
    assert cloud.calls() == [create()]


def test_install(cloud: Cloud) -> None:
    assert cloud.work("install.sh", "--setup", "sudo mount 'my server:/x' /mnt/shared").returncode == 0
    assert cloud.calls() == [ssh("all", "sudo mount 'my server:/x' /mnt/shared"), *install()]


def test_install_says_that_changes_are_left_out(cloud: Cloud) -> None:
    cloud.answer(("diff --quiet HEAD", 1, ""))
    result = cloud.work("install.sh")
    assert result.returncode == 0
    assert "changes that are not committed are left out" in result.stderr


def test_launch_copies_a_configuration_of_this_machine(cloud: Cloud) -> None:
    (cloud.folder / "my run.yaml").write_text("seed: 1\n")
    options = ["--config", "my run.yaml", "--run", "mine"]
    assert cloud.work("launch.sh", *options, "--", "--seed", "2", without=["config"]).returncode == 0
    start = on_worker("all", "start mine --config ./mine.yaml --seed 2")
    assert cloud.calls() == [scp("my run.yaml", "N:rlens_jax/mine.yaml"), start]


def test_watch(cloud: Cloud) -> None:
    cloud.answer(("watch", 3, "rank ended"))
    result = cloud.work("watch.sh")
    assert (result.returncode, result.stdout) == (3, "rank ended\n")
    assert cloud.work("watch.sh", "--worker", "all", "--lines", "5", "--run", "b").returncode == 0
    assert cloud.calls() == [on_worker("0", "watch rank 100"), on_worker("all", "watch b 5")]


@pytest.mark.parametrize(
    "lost",
    [
        [("queued-resources describe", 0, "SUSPENDED")],
        [("queued-resources describe", 0, "FAILED")],
        [("queued-resources describe", 0, "ACTIVE"), ("tpu-vm describe", 0, "PREEMPTED")],
        [("queued-resources describe", 0, "SUSPENDING"), ("queued-resources describe", 0, "SUSPENDED")],
    ],
)
def test_resume_creates_a_lost_slice_again_and_launches_once(
    cloud: Cloud, lost: list[tuple[str, int, str]]
) -> None:
    waiting = ("queued-resources describe", 0, "WAITING_FOR_RESOURCES")
    cloud.answer(*lost, waiting, *ACTIVE)
    result = cloud.work("resume.sh", "--spot", "--setup", "mount it", "--", "--output", "/mnt/a b")
    assert result.returncode == 0, result.stderr
    start = on_worker("all", "start rank --config embedded --output '/mnt/a b'")
    expected = [DELETE, create("--spot"), ssh("all", "mount it"), *install(), start]
    assert [call for call in cloud.calls() if "describe" not in call] == expected
    assert cloud.calls()[-1] == start


def test_resume_leaves_a_slice_that_is_there(cloud: Cloud) -> None:
    cloud.answer(*ACTIVE)
    assert cloud.work("resume.sh").returncode == 0
    assert cloud.calls() == [DESCRIBE, DESCRIBE_NODE, on_worker("all", "start rank --config embedded")]


def test_resume_waits_for_a_slice_on_its_way(cloud: Cloud) -> None:
    cloud.answer(("queued-resources describe", 0, "PROVISIONING"), *ACTIVE)
    assert cloud.work("resume.sh").returncode == 0
    start = on_worker("all", "start rank --config embedded")
    assert [call for call in cloud.calls() if "describe" not in call] == [*install(), start]


def test_resume_changes_nothing_when_the_state_is_unknown(cloud: Cloud) -> None:
    cloud.answer(("queued-resources describe", 1, ""))
    result = cloud.work("resume.sh")
    assert result.returncode == 1
    assert "error: the state of N cannot be looked up" in result.stderr
    assert cloud.calls() == [DESCRIBE]


def test_fetch(cloud: Cloud) -> None:
    bucket = ["--output", "gs://B/my runs", "--to", "here now"]
    assert cloud.run("fetch.sh", "--project", "P", *bucket).returncode == 0
    assert cloud.work("fetch.sh").returncode == 0
    copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", "N:/mnt/runs", "N:rlens_jax/rank.log", "out"]
    assert cloud.calls() == [
        ["mkdir", "-p", "here now"],
        ["gcloud", "storage", "rsync", "gs://B/my runs", "here now", "--recursive", "--project=P"],
        ["mkdir", "-p", "out"],
        [*copy, "--recurse", "--worker=0", *SLICE],
    ]


def test_delete_asks_unless_told_not_to(cloud: Cloud) -> None:
    assert cloud.work("delete.sh").returncode == 0
    assert cloud.work("delete.sh", "--yes").returncode == 0
    assert cloud.calls() == [[word for word in DELETE if word != "--quiet"], DELETE]


def batch_run(name: str) -> list[list[str]]:
    """The commands of a run of a batch that succeeds."""
    start = on_worker("all", f"start {name} --config {name} --output /mnt/runs/{name}")
    return [start, on_worker("0", f"watch {name} 100"), on_worker("all", f"watch {name} 0")]


def test_batch_goes_on_after_a_failing_configuration(cloud: Cloud) -> None:
    cloud.answer(("watch b", 3, ""))
    result = cloud.work("batch.sh", "--delete-after", "--", "a", "b", "no.yaml", "c")
    assert result.returncode == 1
    assert cloud.calls() == [*batch_run("a"), *batch_run("b")[:2], *batch_run("c"), DELETE]
    assert result.stdout.splitlines()[-5:] == [
        "4 configurations, 2 failed:",
        "  done    a",
        "  failed  b (exit code 3)",
        "  failed  no.yaml (exit code 2)",
        "  done    c",
    ]


def test_batch_succeeds_when_all_do(cloud: Cloud) -> None:
    assert cloud.work("batch.sh", "--", "a", "b").returncode == 0
    assert cloud.calls() == [*batch_run("a"), *batch_run("b")]


def test_batch_fails_when_one_worker_does(cloud: Cloud) -> None:
    cloud.answer(("watch a 0", 3, ""))
    assert cloud.work("batch.sh", "--", "a").returncode == 1


def test_batch_resumes_the_same_configuration_after_a_preemption(cloud: Cloud) -> None:
    cloud.answer(("watch a", 255, ""), ("queued-resources describe", 0, "SUSPENDED"), *ACTIVE)
    result = cloud.work("batch.sh", "--spot", "--", "a", "b")
    assert result.returncode == 0, result.stderr
    again = [*batch_run("a")[:2], DELETE, create("--spot"), *install(), *batch_run("a"), *batch_run("b")]
    assert [call for call in cloud.calls() if "describe" not in call] == again


def test_batch_gives_up_after_so_many_attempts(cloud: Cloud) -> None:
    cloud.answer(*[("watch a", 255, "")] * 2, *ACTIVE)
    result = cloud.work("batch.sh", "--attempts", "2", "--", "a", "b")
    assert result.returncode == 1
    assert "  failed  a (exit code 255)\n  done    b\n" in result.stdout
    assert cloud.calls() == [
        *batch_run("a")[:2],
        DESCRIBE,
        DESCRIBE_NODE,
        *batch_run("a")[:2],
        *batch_run("b"),
    ]


def test_gke_create_on_demand_and_spot(cloud: Cloud) -> None:
    assert cloud.work("gke_create.sh").returncode == 0
    assert cloud.work("gke_create.sh", "--spot").returncode == 0
    made = ["cluster", "create", "--tpu-type=v5litepod-16", "--num-slices=1"]
    attached = ["storage", "attach", "rlens-shared", "--type=gcsfuse", "--bucket=B", "--mount-point=/shared"]
    attach = xpk(*attached, "--auto-mount=true", "--readonly=false", "--size=1")
    assert cloud.calls() == [
        xpk(*made, "--on-demand", "--enable-gcsfuse-csi-driver"),
        attach,
        xpk(*made, "--spot", "--enable-gcsfuse-csi-driver"),
        attach,
    ]


def workload(name: str, image: Sequence[str], command: str) -> list[str]:
    """The command that starts a workload."""
    start = ["workload", "create", f"--workload={name}", "--tpu-type=v5litepod-16", "--num-slices=1"]
    return xpk(*start, *image, "--max-restarts=10", "--restart-on-exit-codes=75", f"--command={command}")


def gke_run(name: str, config: str, output: str) -> list[list[str]]:
    """The commands that start a workload from the last commit."""
    dist = REPOSITORY / "dist"
    command = (
        f"pip install --quiet '.[tpu]' && exec python -m rlens_jax.rank --config {config} --output {output}"
    )
    image = ["--base-docker-image=python:3.11", f"--script-dir={dist}/source"]
    unpack = [["rm", "-rf", f"{dist}/source"], ["tar", "-xzf", f"{dist}/rlens_jax.tar.gz", "-C", str(dist)]]
    return [*pack(), *unpack, workload(name, image, command)]


def test_gke_launch(cloud: Cloud) -> None:
    assert cloud.work("gke_launch.sh", "--", "--output", "/shared/a b").returncode == 0
    assert cloud.calls() == gke_run("w", "embedded", "'/shared/a b'")


def test_gke_launch_copies_a_configuration_of_this_machine(cloud: Cloud) -> None:
    (cloud.folder / "mine.yaml").write_text("seed: 1\n")
    options = ["--config", "./mine.yaml", "--", "--output", "/shared"]
    assert cloud.work("gke_launch.sh", *options, without=["config"]).returncode == 0
    *before, last = gke_run("w", "./workload.yaml", "/shared")
    assert cloud.calls() == [*before, ["cp", "./mine.yaml", f"{REPOSITORY}/dist/source/workload.yaml"], last]


def test_gke_launch_with_an_image(cloud: Cloud) -> None:
    image = "--docker-image=gcr.io/P/image"
    assert cloud.work("gke_launch.sh", image, "--config", "/app/x.yaml", "--", "--seed", "1").returncode == 0
    command = "exec python -m rlens_jax.rank --config /app/x.yaml --seed 1"
    assert cloud.calls() == [workload("w", [image], command)]


def gke_watch(name: str) -> list[list[str]]:
    """The commands that follow a workload."""
    selector = f"--selector=xpk.google.com/workload={name},batch.kubernetes.io/job-completion-index=0"
    return [
        ["gcloud", "container", "clusters", "get-credentials", "C", "--location=eu-w4", "--project=P"],
        ["kubectl", "logs", selector, "--follow", "--tail=100"],
        [
            "xpk",
            "workload",
            "list",
            f"--wait-for-job-completion={name}",
            "--cluster=C",
            "--project=P",
            "--zone=eu-w4-a",
        ],
    ]


@pytest.mark.parametrize(("log", "end", "code"), [(0, 0, 0), (1, 0, 0), (0, 125, 1)])
def test_gke_watch(cloud: Cloud, log: int, end: int, code: int) -> None:
    cloud.answer(("kubectl logs", log, "line"), ("workload list", end, ""))
    assert cloud.work("gke_watch.sh", "--zone", "eu-w4-a").returncode == code
    assert cloud.calls() == gke_watch("w")


def test_gke_delete(cloud: Cloud) -> None:
    assert cloud.work("gke_delete.sh").returncode == 0
    assert cloud.work("gke_delete.sh", "--whole-cluster", "--yes").returncode == 0
    assert cloud.calls() == [xpk("workload", "delete", "--workload=w"), xpk("cluster", "delete", "--force")]


def test_gke_batch_goes_on_after_a_failing_configuration(cloud: Cloud) -> None:
    cloud.answer(("create --workload=b-1", 1, ""), ("completion=a", 125, ""))
    result = cloud.work("gke_batch.sh", "--zone=eu-w4-a", "--", "a", "B_1", "c")
    assert result.returncode == 1
    started = [
        *gke_run("a", "a", "/mnt/runs/a"),
        *gke_run("b-1", "B_1", "/mnt/runs/B_1"),
        *gke_run("c", "c", "/mnt/runs/c"),
    ]
    zoned = [[word.replace("--zone=Z", "--zone=eu-w4-a") for word in call] for call in started]
    assert cloud.calls() == [*zoned, *gke_watch("a"), *gke_watch("c")]
    assert result.stdout.splitlines()[-4:] == [
        "3 configurations, 2 failed:",
        "  failed  a (exit code 1)",
        "  failed  B_1 (exit code 1)",
        "  done    c",
    ]


@pytest.mark.parametrize("script", COMMANDS)
def test_print_runs_nothing_and_shows_what_would_run(cloud: Cloud, script: str) -> None:
    # Resuming shows the way after a preemption, so that is what the state is here.
    resumed = [("queued-resources describe", 0, "SUSPENDED")] if script == "resume.sh" else []
    cloud.answer(*resumed, *ACTIVE)
    rest = REST.get(script, ["--", "--output", '/mnt/it\'s a "$HOME" *'] if "launch" in script else [])
    shown = cloud.work(script, "--print", *rest)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert cloud.calls() == []
    subprocess.run(["bash", "-euc", shown.stdout], env=cloud.environment, check=True, capture_output=True)
    printed = cloud.calls()
    assert printed
    (cloud.folder / "calls").unlink()
    cloud.answer(*resumed, *ACTIVE)
    assert cloud.work(script, *rest).returncode == 0
    assert cloud.calls() == printed


@pytest.mark.parametrize("script", COMMANDS)
def test_help_explains_every_option(cloud: Cloud, script: str) -> None:
    result = cloud.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    text = (FOLDER / script).read_text()
    lists = re.findall(r"^(?:needs|takes|switches)=\((.*)\)$", text, re.MULTILINE)
    for option in {name for names in lists for name in names.split()} | {"print"}:
        assert re.search(rf"^  --{option} +\S", result.stdout, re.MULTILINE), option
    assert f"  tpu_scripts/{script} --project P" in result.stdout
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("script", "needed"), [(script, name) for script in NEEDS for name in NEEDS[script].split()]
)
def test_a_missing_setting_is_one_clear_line(cloud: Cloud, script: str, needed: str) -> None:
    result = cloud.work(script, *REST.get(script, []), without=[needed])
    assert result.returncode == 2
    line = f"error: --{needed} is missing (or set RLENS_{needed.upper().replace('-', '_')}); see {script} --help\n"
    assert result.stderr == line
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("create.sh", ["--zome", "x"], "unknown option --zome (did you mean --zone?)"),
        (
            "create.sh",
            ["--accelerator=v5e"],
            "unknown option --accelerator (did you mean --accelerator-type?)",
        ),
        ("delete.sh", ["--force"], "unknown option --force"),
        ("watch.sh", ["N"], "unexpected argument 'N'"),
        ("watch.sh", ["-z"], "unexpected argument '-z'"),
        ("watch.sh", ["--"], "nothing may follow --"),
        ("create.sh", ["--zone", "--spot"], "--zone needs a value"),
        ("create.sh", ["--spot=no"], "--spot takes no value"),
        ("launch.sh", ["--", "--print"], "--print must stand before --"),
        ("launch.sh", ["--run", "a b"], "--run must be letters, digits, '.', '_' and '-', not 'a b'"),
        ("launch.sh", ["--config", "no/file.yaml"], "--config: there is no file no/file.yaml"),
        ("resume.sh", ["--config", "file.yml"], "--config: there is no file file.yml"),
        ("gke_launch.sh", ["--workload", "My_run"], "--workload must be up to 40 lower-case letters"),
        ("batch.sh", ["--"], "name the configurations after --, and nothing else"),
        ("batch.sh", ["--", "a", "--seed", "1"], "name the configurations after --, and nothing else"),
        ("batch.sh", ["--", "x/a.yaml", "b", "y/a.yaml"], "several configurations would be called a"),
    ],
)
def test_bad_input_is_one_clear_line(cloud: Cloud, script: str, arguments: list[str], line: str) -> None:
    result = cloud.work(script, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {line}")
    assert result.stderr.count("\n") == 1
    assert cloud.calls() == []


def test_settings_come_from_the_environment_and_options_win(cloud: Cloud) -> None:
    settings = {f"RLENS_{name}": value for name, value in (("PROJECT", "P"), ("ZONE", "far"), ("NAME", "N"))}
    assert cloud.run("watch.sh", "--zone", "Z", RLENS_RUN="b", **settings).returncode == 0
    assert cloud.calls() == [on_worker("0", "watch b 100")]
    refused = cloud.run("delete.sh", RLENS_YES="no", **settings)
    assert (refused.returncode, len(cloud.calls())) == (2, 1)
    assert refused.stderr.startswith("error: RLENS_YES must be yes or not set")


FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>called
echo "a line of the log"
[[ $* != *--wait* ]] || until [[ -e go ]]; do sleep 0.05; done
[[ $* != *--fail* ]] || exit "${@: -1}"
"""


@dataclass
class Worker:
    """A TPU VM after its installation: a home folder."""

    home: Path

    def __post_init__(self) -> None:
        (self.home / "rlens_jax" / "venv" / "bin").mkdir(parents=True)
        (self.home / "rlens_jax" / "source").symlink_to(REPOSITORY)
        python = self.home / "rlens_jax" / "venv" / "bin" / "python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)

    def run(self, command: str) -> "subprocess.CompletedProcess[str]":
        """What ssh would run."""
        environment = os.environ | {"HOME": str(self.home)}
        return subprocess.run(
            ["bash", "-c", command], env=environment, cwd=self.home, text=True, capture_output=True
        )

    def script(self, words: str) -> "subprocess.CompletedProcess[str]":
        return self.run(f"bash rlens_jax/source/tpu_scripts/lib/on_worker.sh {words}")

    def called(self) -> list[str]:
        """The arguments of every start of the worker's Python."""
        file = self.home / "rlens_jax" / "called"
        return file.read_text().split("\0")[:-1] if file.exists() else []

    def let_go(self) -> None:
        (self.home / "rlens_jax" / "go").touch()


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path / "home")


def test_arguments_reach_the_run_as_they_were_given(cloud: Cloud, worker: Worker) -> None:
    hard = ["--output", '/mnt/it\'s a "$HOME" `x` * \\ ;&', "--data", "two\nlines", "--empty", ""]
    assert cloud.work("launch.sh", "--", *hard).returncode == 0
    (_, command) = cloud.calls()[0][7].split("--command=", 1)
    assert worker.run(command).returncode == 0
    watched = worker.script("watch rank 100")
    assert watched.returncode == 0, watched
    assert worker.called() == ["-m", "rlens_jax.rank", "--config", "embedded", *hard]


def test_arguments_reach_a_workload_as_they_were_given(cloud: Cloud) -> None:
    hard = ["--output", '/shared/it\'s a "$HOME" `x` * \\ ;&', "--empty", ""]
    assert cloud.work("gke_launch.sh", "--docker-image=i", "--", *hard).returncode == 0
    (command,) = [
        word.removeprefix("--command=") for word in cloud.calls()[0] if word.startswith("--command=")
    ]
    # As XPK runs it in the container.
    show = "python() { printf '%s\\0' \"$@\"; }; " + command.replace("exec ", "", 1)
    shown = subprocess.run(["bash", "-c", f"({show}) & wait $!"], text=True, capture_output=True, check=True)
    assert shown.stdout.split("\0")[:-1] == ["-m", "rlens_jax.rank", "--config", "embedded", *hard]


def test_a_run_is_started_once_however_often_it_is_asked_for(worker: Worker) -> None:
    assert worker.script("start a --wait").returncode == 0
    again = worker.script("start a --wait")
    assert (again.returncode, again.stderr[:12]) == (0, "a is running")
    other = worker.script("start b")
    assert (other.returncode, other.stderr[:12]) == (1, "a is running")
    worker.let_go()
    assert worker.script("watch a 100").returncode == 0
    assert worker.called() == ["-m", "rlens_jax.rank", "--wait"]
    assert worker.script("start a").returncode == 0, "what has ended can be started again"
    assert worker.script("watch a 0").returncode == 0
    assert worker.called() == ["-m", "rlens_jax.rank", "--wait", "-m", "rlens_jax.rank"]


def test_watching_ends_with_the_run(worker: Worker) -> None:
    worker.script("start a --fail 2")
    failed = worker.script("watch a 100")
    assert failed.returncode == 3
    assert failed.stdout.startswith("a line of the log\na ended on ")
    assert failed.stdout.endswith("with exit code 2\n")
    missing = worker.script("watch b 100")
    assert (missing.returncode, missing.stderr.startswith("error: there is no run b on ")) == (3, True)


@pytest.mark.parametrize("code", [75, 143])
def test_a_stopped_run_can_go_on(worker: Worker, code: int) -> None:
    worker.script(f"start a --fail {code}")
    stopped = worker.script("watch a 0")
    assert stopped.returncode == 75
    assert stopped.stdout.endswith(f"with exit code {code}\n")


def test_a_killed_run_can_go_on(worker: Worker) -> None:
    worker.script("start a --wait")
    pid = int((worker.home / "rlens_jax" / "a.pid").read_text())
    while not worker.called():
        time.sleep(0.02)
    os.kill(pid, 9)
    worker.let_go()
    killed = worker.script("watch a 100")
    assert (killed.returncode, killed.stdout.splitlines()[-1].endswith("unknown, it was killed")) == (
        75,
        True,
    )


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: path.name)
def test_scripts_are_short_and_say_what_they_do(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 130
    if path.parent == FOLDER:
        header = lines[1 : lines.index("")]
        assert all(line.startswith("# ") for line in header)
        assert 3 <= len(header) <= 7
        assert "cost" in " ".join(header).lower()
        assert os.access(path, os.X_OK)
        assert lines[0] == "#!/usr/bin/env bash"


def test_every_explained_option_is_taken_by_a_script() -> None:
    explained = set(re.findall(r"\[([a-z-]+)\]=\"", (FOLDER / "lib" / "help.sh").read_text()))
    lists = [
        re.findall(r"^(?:needs|takes|switches)=\((.*)\)$", (FOLDER / name).read_text(), re.MULTILINE)
        for name in COMMANDS
    ]
    taken = {option for names in lists for line in names for option in line.split()}
    assert explained == taken | {"print"}
