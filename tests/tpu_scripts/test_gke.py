"""The scripts for clusters, against a stand-in for the cloud's commands."""

import subprocess
from collections.abc import Sequence

import pytest

from tests.tpu_scripts.cloud import REPOSITORY, SLICE, Cloud, pack

pytestmark = pytest.mark.slow


def xpk(*words: str) -> list[str]:
    """A command of XPK's."""
    return ["xpk", *words, "--cluster=C", *SLICE]


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
    command = f"pip install --quiet '.[tpu,gcs]' && exec python -m rlens_jax.rank --config {config} --output {output}"
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
        ["xpk", "workload", "list", f"--wait-for-job-completion={name}", "--cluster=C", "--project=P", "--zone=eu-w4-a"],
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
    started = [*gke_run("a", "a", "/mnt/runs/a"), *gke_run("b-1", "B_1", "/mnt/runs/B_1"), *gke_run("c", "c", "/mnt/runs/c")]
    zoned = [[word.replace("--zone=Z", "--zone=eu-w4-a") for word in call] for call in started]
    assert cloud.calls() == [*zoned, *gke_watch("a"), *gke_watch("c")]
    assert result.stdout.splitlines()[-4:] == [
        "3 configurations, 2 failed:",
        "  failed  a (exit code 1)",
        "  failed  B_1 (exit code 1)",
        "  done    c",
    ]


def test_arguments_reach_a_workload_as_they_were_given(cloud: Cloud) -> None:
    hard = ["--output", '/shared/it\'s a "$HOME" `x` * \\ ;&', "--empty", ""]
    assert cloud.work("gke_launch.sh", "--docker-image=i", "--", *hard).returncode == 0
    (command,) = [word.removeprefix("--command=") for word in cloud.calls()[0] if word.startswith("--command=")]
    # As XPK runs it in the container.
    show = "python() { printf '%s\\0' \"$@\"; }; " + command.replace("exec ", "", 1)
    shown = subprocess.run(["bash", "-c", f"({show}) & wait $!"], text=True, capture_output=True, check=True)
    assert shown.stdout.split("\0")[:-1] == ["-m", "rlens_jax.rank", "--config", "embedded", *hard]
