"""The scripts for slices of TPU VMs, against a stand-in for the cloud's commands."""

import pytest

from tests.tpu_scripts.cloud import ACTIVE, DELETE, DESCRIBE, DESCRIBE_NODE, SLICE, Cloud, create, install, on_worker, scp, ssh

pytestmark = pytest.mark.slow


def test_create_on_demand_and_spot(cloud: Cloud) -> None:
    cloud.answer(*ACTIVE, *ACTIVE)
    assert cloud.work("create.sh").returncode == 0
    assert cloud.calls() == [create(), DESCRIBE, DESCRIBE_NODE]
    extra = ["--spot", "--valid-until-duration", "6h", "--create-flags=--network=net --reserved"]
    assert cloud.work("create.sh", *extra).returncode == 0
    assert cloud.calls()[3] == create("--network=net", "--reserved", "--spot", "--valid-until-duration=6h")


def test_create_waits_until_the_slice_can_be_used(cloud: Cloud) -> None:
    waiting = [("queued-resources describe", 0, state) for state in ("WAITING_FOR_RESOURCES", "PROVISIONING")]
    cloud.answer(*waiting, ("queued-resources describe", 0, "ACTIVE"), ("tpu-vm describe", 0, "CREATING"), *ACTIVE)
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
    assert "uncommitted changes are left out" in result.stderr


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
def test_resume_creates_a_lost_slice_again_and_launches_once(cloud: Cloud, lost: list[tuple[str, int, str]]) -> None:
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
    assert "error: the state of N cannot be read" in result.stderr
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
    assert cloud.calls() == [*batch_run("a")[:2], DESCRIBE, DESCRIBE_NODE, *batch_run("a")[:2], *batch_run("b")]
