"""A stand-in for the cloud's commands that records how it is called, and the calls that are expected."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
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
[[ $* != *describe* ]]  # with no answer for it, a script that waits for a state would wait for ever
"""

SLICE = ["--project=P", "--zone=Z"]
SETTINGS = {"project": "P", "zone": "Z", "name": "N", "accelerator-type": "v5litepod-16", "runtime-version": "R"}
SETTINGS |= {"cluster": "C", "bucket": "B", "workload": "w", "config": "embedded", "output": "/mnt/runs", "to": "out"}
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

DESCRIBE = ["gcloud", "compute", "tpus", "queued-resources", "describe", "N", *SLICE, "--format=value(state.state)"]
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
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "N", f"--worker={worker}", f"--command={command}", *SLICE]


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
        return subprocess.run(command, env=self.environment | environment, cwd=self.folder, text=True, capture_output=True)

    def work(self, script: str, *arguments: str, without: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
        """Run a script with what it needs, and more."""
        needs = {name: SETTINGS[name] for name in NEEDS[script].split() if name not in without}
        return self.run(script, *(f"--{name}={value}" for name, value in needs.items()), *arguments)
