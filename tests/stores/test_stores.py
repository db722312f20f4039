"""Mirrors, logs, locks and new folders on a store, and its failures."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlens_jax import mirrors, store_locks, store_logs, stores
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.data.benchmarks.catalogue import BENCHMARKS
from rlens_jax.data.benchmarks.tfds_builder import read_benchmark, read_table
from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.durable_log import LogKind, check_free, open_log, read_log
from rlens_jax.errors import UserError
from rlens_jax.files import new_folder, replace_file
from tests.data.benchmarks.files import five_rows, md5_of, write_tsv
from tests.stores.fake_store import FakeStore

KIND = LogKind[Any]("rlens-test", 1, "steps", "step", lambda fields: (fields["n"], fields))
RUN = "gs://bucket/run"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs does not wait between its tries, and neither do we."""

    async def at_once(seconds: float) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=at_once))
    monkeypatch.setattr(stores, "_WAITS", (0.0, 0.0))


def append(folder: Path, *numbers: int, restart: bool = False, **fingerprint: Any) -> list[int]:
    """Open the log, append items, close it; the items that were there."""
    items, writer, _ = open_log(folder, KIND, fingerprint, restart=restart)
    for number in numbers:
        writer.write(json.dumps({"n": number}).encode() + b"\n")
    writer.close()
    return list(items)


def forget() -> None:
    """Delete all local copies."""
    shutil.rmtree(mirrors.place("gs://bucket").parents[1])


def test_addresses_and_paths(store: FakeStore) -> None:
    path = mirrors.place("gs://bucket/a b/c/")
    assert mirrors.address_of(path) == "gs://bucket/a b/c" and mirrors.place(path) == path
    assert mirrors.with_addresses(f"{path}/x: no such file") == "gs://bucket/a b/c/x: no such file"
    assert mirrors.place("runs/a") == Path("runs/a") and mirrors.address_of(Path("runs/a")) is None
    for bad in ("gs://", "gs:///x", "gs://bucket/../../x", "gs://bucket/a//b"):
        with pytest.raises(UserError, match="not the address of a folder or an object"):
            mirrors.place(bad)
    with pytest.raises(UserError, match="gs:/bucket/a: gs://bucket/folder has two slashes"):
        mirrors.place(Path("gs://bucket/a"))
    for address in ("nosuch://a/b", "https://a/b.png"):
        with pytest.raises(UserError, match="not a kind of store that can be used"):
            stores.listed(address)
    store.put("bucket/a/b", b"b")
    there = [mirrors.exists(mirrors.place(f"gs://bucket/{name}")) for name in ("a/b", "a", "a/c")]
    assert there == [True, True, False]


def test_only_what_changed_is_downloaded(store: FakeStore) -> None:
    for name in ("config.json", "old.json", "folder/deep.json", "folder/", "weights.bin"):
        store.put(f"bucket/model/{name}", name.encode())
    folder = mirrors.place("gs://bucket/model")

    def downloads() -> list[str]:
        before = len(store.requests)
        mirrors.fetched_folder(folder, lambda name: not name.endswith(".bin"))
        return [request for request in store.requests[before:] if "alt=media" in request]

    assert len(downloads()) == 2 and downloads() == []
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "old.json"]
    del store.objects["bucket/model/old.json"]
    store.put("bucket/model/config.json", b"new")
    (folder / ".config.json.7.partial").write_bytes(b"ne")  # of a killed download
    assert len(downloads()) == 1
    assert (folder / "config.json").read_bytes() == b"new" and not (folder / "old.json").exists()
    (folder / "config.json").write_bytes(b"NEW")  # another file of the same size
    assert len(downloads()) == 1 and (folder / "config.json").read_bytes() == b"new"


def test_a_data_file_brings_its_images(store: FakeStore) -> None:
    rows = [{"image": name, "question": "?", "answer": "x", "dataset": "d"} for name in ("a/1.png", "../2.png", "none.png")]
    store.put("bucket/d/data.jsonl", "\n".join(map(json.dumps, rows)).encode())
    store.put("bucket/d/a/1.png", b"1")
    store.put("bucket/2.png", b"2")
    with pytest.raises(UserError, match=r"none\.png") as error:
        read_jsonl(mirrors.place("gs://bucket/d/data.jsonl"))
    assert "gs://bucket/d/none.png" in mirrors.with_addresses(str(error.value))
    store.put("bucket/d/none.png", b"3")
    samples = read_jsonl(mirrors.place("gs://bucket/d/data.jsonl"))
    assert [Path(sample.images[0]).read_bytes() for sample in samples] == [b"1", b"2", b"3"]


def test_a_benchmark_is_read_from_the_store(store: FakeStore, tmp_path: Path) -> None:
    rows = five_rows("MMStar")
    table = write_tsv(tmp_path / "MMStar.tsv", rows)
    store.put("bucket/LMUData/MMStar.tsv", table.read_bytes())
    folder = mirrors.place("gs://bucket/LMUData")
    assert read_benchmark("MMStar", folder, tmp_path / "prepared", md5_of(table)).indices == [row["index"] for row in rows]
    store.objects.clear()
    with pytest.raises(UserError, match=r"MMStar\.tsv: no such file"):
        read_table(BENCHMARKS["MMStar"], folder)  # also where there is an old copy


def test_a_log_is_resumed_on_another_machine(store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flush is an object; many are joined, and what a kill during that leaves changes nothing."""
    monkeypatch.setattr(store_logs, "_MOST_PARTS", 4)
    folder, local = mirrors.place(RUN), tmp_path / "local"
    done: list[int] = []
    for numbers in ((1, 2, 3), (4, 5), (6,), ()):
        for place in (folder, local):
            assert append(place, *numbers, a=1) == done
        done += numbers
        parts = {name: store.objects[name] for name in store.names("bucket/run/steps.parts/")}
        forget()
    store.objects |= parts
    store.objects.update({f"bucket/run/steps.parts/{number:08d}-{number:08d}": (b"x", 1) for number in range(3)})
    assert list(read_log(folder, KIND, {"a": 1})) == done
    assert (folder / "steps.jsonl").read_bytes() == (local / "steps.jsonl").read_bytes()
    assert append(folder, 7, a=1) == done
    assert not store.names("bucket/run/steps.lock/")
    assert len(store.names("bucket/run/steps.parts/")) <= 4 + 1
    with pytest.raises(UserError, match="belongs to a run of another configuration"):
        append(folder, a=2)
    assert append(folder, 1, a=2, restart=True) == []
    assert b'"n": 7' in store.objects["bucket/run/steps.1.jsonl"][0]
    forget()
    assert append(folder, a=2) == [1]
    del store.objects["bucket/run/steps.parts/00000000-00000000"]
    with pytest.raises(UserError, match="the part 00000000 is missing"):
        append(folder, a=2)


def test_a_log_without_a_line_leaves_nothing(store: FakeStore) -> None:
    append(mirrors.place(RUN), a=1)
    assert store.objects == {}
    assert append(mirrors.place(RUN), 1, a=2) == []


def test_a_log_that_another_run_writes(store: FakeStore) -> None:
    """The second finds the number of its next part taken."""
    _, writer, _ = open_log(mirrors.place(RUN), KIND, {})
    store.put("bucket/run/steps.parts/00000001-00000001", b'{"n": 9}\n')
    with pytest.raises(UserError, match="another run has written to this log"):
        writer.write(b'{"n": 1}\n')
    writer.close()
    assert store.names("bucket/run/") == ["bucket/run/steps.parts/00000001-00000001"]  # its own header is gone


def test_a_living_holder_is_refused_and_a_dead_one_replaced(store: FakeStore) -> None:
    folder = mirrors.place(RUN)
    code = (
        "import sys; from pathlib import Path; from rlens_jax.store_locks import StoreLock;"
        f"StoreLock('{RUN}/steps.lock', 'it'); print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, env={**os.environ}) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        for use in (lambda: append(folder, 1), lambda: check_free(folder, KIND)):
            with pytest.raises(UserError, match=f"another run is using {RUN} .process {holder.pid} on"):
                use()
        holder.kill()
    assert len(store.names("bucket/run/steps.lock/")) == 1
    assert append(folder, 1) == [] and not store.names("bucket/run/steps.lock/")


@pytest.mark.parametrize("lives", [False, True])
def test_a_holder_on_another_machine(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lives: bool
) -> None:
    """Without clocks: a lock that changes is alive, one that does not change for a while is not. Its name is foreign text."""
    monkeypatch.setattr(store_locks, "DEAD_AFTER", 0.4)
    name, holder = "bucket/run/steps.lock/f00", {"machine": "other", "host": "far\x1b[2J", "process": 1}
    store.put(name, json.dumps(holder).encode())
    beat = threading.Timer(0.1, lambda: store.put(name, json.dumps({**holder, "beat": 2}).encode()))
    if lives:
        beat.start()
        with pytest.raises(UserError, match=r"another run is using .* \(process 1 on far"):
            append(mirrors.place(RUN), 1)
    else:
        assert append(mirrors.place(RUN), 1) == []
    assert store.names("bucket/run/steps.lock/") == ([name] if lives else [])
    assert capsys.readouterr().err == f"{RUN}: locked by a process on far\\x1b[2J; waiting up to 0 s for its sign of life\n"


def test_a_run_that_was_taken_for_dead_writes_no_more(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_locks, "BEAT", 0.05)
    lock = store_locks.StoreLock(f"{RUN}/steps.lock", RUN)
    store.objects.clear()
    lock._thread.join(10)
    with pytest.raises(UserError, match="another run has taken it over"):
        lock.check()
    lock.release()


def test_two_that_start_together_do_not_both_get_a_lock(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one writes its object after the first look of this one."""
    monkeypatch.setattr(store_locks.StoreLock, "_beat", lambda lock: store.put("bucket/run/steps.lock/f00", b"{}"))
    with pytest.raises(UserError, match="another run is using"):
        store_locks.StoreLock(f"{RUN}/steps.lock", RUN)


def test_a_new_folder_is_whole_or_not_there(store: FakeStore) -> None:
    folder = mirrors.place("gs://bucket/new")
    with pytest.raises(OSError, match="no such"), new_folder(folder) as partial:
        shutil.copyfile(partial / "no such", partial / "file")
    assert store.objects == {} and list(folder.parent.iterdir()) == []
    dead = json.dumps({**store_locks._this_process(), "process": 2**22 + 1}).encode()
    store.put("bucket/new/.unfinished/f00", dead)
    store.put("bucket/new/config.json", b"half")
    with pytest.raises(UserError, match="a conversion writes this folder or was killed"):
        find_model("gs://bucket/new")
    with new_folder(folder) as partial:
        (partial / "orbax").mkdir()
        (partial / "orbax" / "b").write_bytes(b"b")
        assert store.names("bucket/new/") != []
    assert store.names("bucket/") == ["bucket/new/orbax/b"] and not folder.exists()
    with pytest.raises(UserError, match="gs://bucket/new: exists already"), new_folder(folder):
        pass


def test_no_permission(store: FakeStore) -> None:
    store.put("bucket/a", b"a")
    store.deny = True
    for use in (
        lambda: stores.listed("gs://bucket"),
        lambda: stores.read("gs://bucket/a"),
        lambda: stores.put("gs://bucket/b", b"b"),
        lambda: open_log(mirrors.place(RUN), KIND, {}),
    ):
        with pytest.raises(UserError, match=r"^gs://bucket[^\n]*: no permission on the store [^\n]*sign in[^\n]*$"):
            use()


def test_failures_pass_or_end_in_one_line(store: FakeStore, impatient: None, capfd: pytest.CaptureFixture[str]) -> None:
    store.fail_every = 10
    for number in range(30):
        stores.put(f"gs://bucket/{number}", b"x")
        assert stores.read(f"gs://bucket/{number}") == b"x"
    append(mirrors.place(RUN), *range(30))
    assert append(mirrors.place(RUN)) == list(range(30))
    store.fail_every = 1
    with pytest.raises(UserError, match=r"^gs://bucket/0: the store failed several times [^\n]*start the same command again$"):
        stores.read("gs://bucket/0")
    assert capfd.readouterr().err == ""


def test_a_result_is_on_the_store_first(store: FakeStore) -> None:
    path = mirrors.place(f"{RUN}/ranking.json")
    path.parent.mkdir(parents=True)
    replace_file(path, b"{}")
    assert store.objects["bucket/run/ranking.json"][0] == b"{}" == path.read_bytes()
    store.deny = True
    with pytest.raises(UserError, match="no permission"):
        replace_file(path, b"[]")
    assert path.read_bytes() == b"{}"
