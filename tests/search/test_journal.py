import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from rlens_jax import durable_log
from rlens_jax.errors import UserError
from rlens_jax.plans import SKIP, Plan
from rlens_jax.search.journal import JOURNAL_NAME, Journal, Record

CONFIG = {"model": "toy", "seed": 0, "reduction": {"attention_range": 256, "active_fraction": 0.2}}

RECORDS = [
    Record("validation", Plan(), (0, 3, 4, 7, 2), (1.0, 0.0, 1.0, 1.0, 0.0), 1.5),
    Record("validation", Plan(attention=(2, 3)), range(8), (0.0,) * 8, 2.0),
    Record("heldout", Plan(attention=(2, 3)), range(9), (1.0,) * 9, 2.0),
    Record("validation", Plan(attention=(2, 3)), (8, 11, 9, 10), (0.1, 1 / 3, 1.0, -2.5e-300), 0.25),
]
COUNT = 12
NAN = float("nan")


def write(folder, records=RECORDS):
    with Journal.open(folder, CONFIG) as journal:
        for record in records:
            journal.append(record)
    return folder / JOURNAL_NAME


def content(journal):
    """All that the journal knows of the plans in RECORDS."""
    keys = dict.fromkeys((record.split, record.plan) for record in RECORDS)
    found = {key: journal.outcomes(*key, COUNT) for key in keys}
    assert journal.num_outcomes == sum(np.isfinite(values).sum() for values in found.values())
    return [(key, number, values[number]) for key, values in found.items() for number in np.flatnonzero(np.isfinite(values))]


def written(records):
    """What `content` finds after these records."""
    triples = [((r.split, r.plan), *pair) for r in records for pair in zip(r.samples, r.outcomes, strict=True)]
    keys = list(dict.fromkeys((record.split, record.plan) for record in RECORDS))
    return sorted(triples, key=lambda triple: (keys.index(triple[0]), triple[1]))


def reopen(folder):
    with Journal.open(folder, CONFIG) as journal:
        return content(journal), journal.repaired


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path / "new" / "run")
    with Journal.open(tmp_path / "new" / "run", CONFIG) as journal:
        assert content(journal) == written(RECORDS)
        assert journal.repaired is None
        np.testing.assert_array_equal(journal.outcomes("validation", Plan(), 9), [1, NAN, 0, 0, 1, NAN, NAN, 1, NAN])
        assert journal.outcomes("validation", Plan(), 9).dtype == np.float64
        for split, plan in (("heldout", Plan()), ("validation", Plan(ffn=(2, 3)))):
            assert np.isnan(journal.outcomes(split, plan, 4)).tolist() == [True] * 4


def test_the_file_is_as_documented(tmp_path):
    header, *lines = map(json.loads, write(tmp_path).read_text().splitlines())
    assert header == {"schema": "rlens-journal", "version": 2, "fingerprint": CONFIG}
    first = {"split": "validation", "attention": [], "ffn": [], "samples": [0, 3, 4, 7, 2], "outcomes": "5:b0", "seconds": 1.5}
    assert lines[0] == first
    assert [line["outcomes"] for line in lines[1:3]] == ["8:00", "9:ff80"]
    assert lines[3]["samples"] == [8, 11, 9, 10]
    assert lines[3]["outcomes"] == [0.1, 1 / 3, 1.0, -2.5e-300]
    assert sorted(os.listdir(tmp_path)) == ["journal.jsonl", "journal.lock"]


def test_levels_are_written_and_read_back(tmp_path):
    plan = Plan.of({0: SKIP, 1: 0, 2: 64}, {0: SKIP, 3: 0.25})
    line = write(tmp_path, [Record("validation", plan, np.array([1]), np.array([1.0]), 0.0)]).read_text().splitlines()[1]
    assert json.loads(line)["freeze"] == [0]
    with Journal.open(tmp_path, CONFIG) as journal:
        assert journal.outcomes("validation", plan, 3)[1] == 1.0
        assert np.isnan(journal.outcomes("validation", plan.with_level("attention", 2, 63), 3)).all()


def test_numpy_arrays_are_taken(tmp_path):
    write(tmp_path, [Record("validation", Plan(), np.array([4, 0], np.int32), np.array([True, False]), 0.0)])
    assert reopen(tmp_path)[0] == [(("validation", Plan()), 0, 0.0), (("validation", Plan()), 4, 1.0)]


def test_records_of_a_resumed_run_are_added(tmp_path):
    write(tmp_path, RECORDS[:2])
    write(tmp_path, RECORDS[2:])
    assert reopen(tmp_path) == (written(RECORDS), None)


@pytest.mark.parametrize("reopened", [False, True])
def test_nothing_is_evaluated_twice(tmp_path, reopened):
    path = write(tmp_path)
    before = path.read_bytes()
    again = Record("validation", Plan(attention=(3, 2)), (12, 5), (1.0, 1.0), 0.0)
    with Journal.open(tmp_path, CONFIG) as journal:
        if not reopened:
            fresh = Record("validation", Plan(ffn=(1,)), [5], (1.0,), 0.0)
            journal.append(fresh)
            before, again = path.read_bytes(), fresh
        with pytest.raises(
            ValueError, match=r"repeats the evaluation of sample 5 \(split validation, plan (attention 2-3|ffn 1)"
        ):
            journal.append(again)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("samples", "outcomes", "reason"),
    [
        ((), (), "finite numbers, at least one"),
        ((8, 9), (0.5, NAN), "finite"),
        ((8,), (float("inf"),), "finite"),
        ((8, 9), (1.0,), "2 samples have 1 outcomes"),
        ((8, 8), (1.0, 1.0), "names a sample twice"),
        ((-1,), (1.0,), "whole numbers from 0"),
        ((10**7,), (1.0,), "whole numbers from 0 to 9999999"),
    ],
)
def test_what_means_nothing_is_not_written(tmp_path, samples, outcomes, reason):
    path = write(tmp_path)
    before = path.read_bytes()
    with Journal.open(tmp_path, CONFIG) as journal, pytest.raises(ValueError, match=reason):
        journal.append(Record("validation", Plan(), samples, outcomes, 0.0))
    assert path.read_bytes() == before


def test_a_write_torn_at_any_byte_is_repaired(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        records, repaired = reopen(tmp_path)
        assert records == written(RECORDS[:-1])
        assert path.read_bytes() == whole[:last]
        if cut == last:
            assert repaired is None
        else:
            assert f"last line of {cut - last} bytes; 3 finished" in repaired
    write(tmp_path, RECORDS[-1:])
    assert path.read_bytes() == whole


def test_a_last_line_of_zeros_is_repaired(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(30) + b'"seconds": 1.0}\n')
    records, repaired = reopen(tmp_path)
    assert records == written(RECORDS)
    assert "unfinished last line of 46 bytes" in repaired
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"outcomes": "8:00"', b'"outcomes": "8:0', "Invalid control|Expecting"),
        (b'"outcomes": "8:00"', b'"outcomes": "9:00"', "number they announce"),
        (b'"outcomes": "8:00"', b'"outcomes": [NaN]', "NaN is not a number"),
        (b'"outcomes": "8:00"', b'"outcomes": [' + b"9" * 5000 + b"]", "a number of 5000 digits"),
        (b'"outcomes": "8:00"', b'"outcomes": ' + b"[" * 5000 + b"]" * 5000, "too deeply nested"),
        (b'"attention": [2, 3]', b'"attention": [99999999999999999999]', "no model has a layer"),
        (b'"outcomes": "8:00"', b'"outcomes": []', "finite"),
        (b'"outcomes": "8:00"', b'"outcomes": "7:00"', "8 samples have 7 outcomes"),
        (b'"outcomes": "8:00"', b'"outcomes": [true]', "finite numbers"),
        (b'"samples": [0, 1', b'"samples": [1, 1', "names a sample twice"),
        (b'"samples": [0, 1', b'"samples": [0, -1', "samples must be whole numbers from 0 to 9999999"),
        (b'"samples": [0, 1', b'"samples": [0, 1.0', "samples must be whole numbers"),
        (b'"samples": [0, 1', b'"samples": [0, true', "samples must be whole numbers"),
        (b'"samples": [0, 1', b'"samples": [0, 10000000', "samples must be whole numbers"),
        (b'"samples": [0, 1, 2, 3, 4, 5, 6, 7]', b'"samples": "01234567"', "samples must be a list"),
        (b'"attention": [2, 3]', b'"attention": [2, 2]', "layer 2 twice"),
        (b'"seconds"', b'"second"', "exactly the fields"),
        (b'"seconds": 2.0', b'"seconds": "2"', "seconds must be a number"),
        (b'"validation"', b"7", "split must be a text"),
    ],
)
def test_a_corrupt_line_in_the_middle_is_named(tmp_path, old, new, reason):
    path = write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert old in lines[2]
    lines[2] = lines[2].replace(old, new, 1)
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"{JOURNAL_NAME}, line 3 cannot be read .*{reason}") as raised:
        Journal.open(tmp_path, CONFIG)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == before


def test_a_line_that_repeats_an_evaluation_is_named(tmp_path):
    path = write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(UserError, match="line 6 repeats the step of an earlier line"):
        Journal.open(tmp_path, CONFIG)
    other = lines[1].replace(b"[0, 3, 4, 7, 2]", b"[1, 5, 6, 8, 2]")
    assert other != lines[1]
    path.write_bytes(b"".join([*lines, other]))
    for opened in (Journal.open, Journal.follow):
        message = (
            r"journal.jsonl, line 6 repeats the evaluation of sample 2 \(split validation, plan dense\); restore the file, or"
        )
        with pytest.raises(UserError, match=message) as raised:
            opened(tmp_path, CONFIG)
        assert "\n" not in str(raised.value)
    path.write_bytes(b"".join(lines))
    assert reopen(tmp_path) == (written(RECORDS), None)  # the refusal let go of the folder


def test_a_sample_that_the_split_has_not_is_named(tmp_path):
    write(tmp_path)
    with Journal.open(tmp_path, CONFIG) as journal:
        with pytest.raises(
            UserError, match=r"sample 7 of the split validation under the plan dense, but the split has 7 samples"
        ):
            journal.outcomes("validation", Plan(), 7)
        assert len(journal.outcomes("validation", Plan(), 8)) == 8


def test_a_wrong_but_whole_last_line_is_not_a_torn_one(tmp_path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"split": "validation"}\n')
    with pytest.raises(UserError, match="line 6 cannot be read"):
        Journal.open(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [b"", b"\n", b"[]\n", b'{"schema": "rlens-journal", "ver', b'{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    (tmp_path / JOURNAL_NAME).write_bytes(content)
    with pytest.raises(UserError, match="line 1 is not the header"):
        Journal.open(tmp_path, CONFIG)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == content


def test_another_version_is_refused(tmp_path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 1'))
    with pytest.raises(UserError, match=r"has version 1, this program reads 2; .* --restart, which renames this journal"):
        Journal.open(tmp_path, CONFIG)
    with Journal.open(tmp_path, CONFIG, restart=True) as journal:
        assert journal.num_outcomes == 0


def test_another_configuration_is_refused_field_by_field(tmp_path):
    path = write(tmp_path)
    before = path.read_bytes()
    other = {"model": "toy", "reduction": {"attention_range": 128, "active_fraction": 0.2}, "alpha": 2.0}
    with pytest.raises(UserError) as raised:
        Journal.open(tmp_path, other)
    message = str(raised.value)
    assert "seed was 0, is not set" in message
    assert "reduction.attention_range was 256, is 128" in message
    assert "alpha was not set, is 2.0" in message
    assert "choose another folder" in message and "--restart" in message
    assert "model" not in message and "active_fraction" not in message and "\n" not in message
    assert path.read_bytes() == before
    # The refusal lets go of the folder.
    assert reopen(tmp_path) == (written(RECORDS), None)


def test_the_order_of_fields_and_the_kind_of_sequence_do_not_matter(tmp_path):
    with Journal.open(tmp_path, {"a": (1, 2), "b": {"c": None, "d": {}}}) as journal:
        journal.append(RECORDS[0])
    with Journal.open(tmp_path, {"b": {"d": {}, "c": None}, "a": [1, 2]}):
        pass
    for other in ({"a": [1, 2], "b": {"c": None}}, {"a": [2, 1], "b": {"c": None, "d": {}}}):
        with pytest.raises(UserError, match="another configuration"):
            Journal.open(tmp_path, other)


def test_a_run_that_ended_before_its_first_evaluation_leaves_no_journal(tmp_path):
    other = {**CONFIG, "seed": 1}
    with pytest.raises(UserError, match="an image"), Journal.open(tmp_path, other):
        raise UserError("an image cannot be read")
    assert os.listdir(tmp_path) == ["journal.lock"]
    # A killed process cannot remove it; it binds nobody.
    header = json.dumps({"schema": "rlens-journal", "version": 2, "fingerprint": other}).encode() + b"\n"
    for left in (header, header + b'{"split": "valid'):
        (tmp_path / JOURNAL_NAME).write_bytes(left)
        write(tmp_path)
        assert reopen(tmp_path) == (written(RECORDS), None)
        (tmp_path / JOURNAL_NAME).unlink()


def test_a_restart_keeps_another_runs_journal_under_another_name(tmp_path):
    before = write(tmp_path).read_bytes()
    for number in (1, 2):
        with Journal.open(tmp_path, {"seed": number}, restart=True) as journal:
            assert journal.num_outcomes == 0
            assert f"is now journal.{number}.jsonl" in journal.repaired
            journal.append(RECORDS[0])
    assert (tmp_path / "journal.1.jsonl").read_bytes() == before
    with Journal.open(tmp_path, {"seed": 2}, restart=True) as journal:
        assert content(journal) == written(RECORDS[:1])
        assert journal.repaired is None
    (tmp_path / JOURNAL_NAME).write_text("something else\n")
    with Journal.open(tmp_path, CONFIG, restart=True) as journal:
        assert journal.num_outcomes == 0
    assert (tmp_path / "journal.3.jsonl").read_text() == "something else\n"


# Appends records without end, and says so after each; the test kills it.
WRITER = """
import sys
from pathlib import Path
from rlens_jax.plans import Plan
from rlens_jax.search.journal import Journal, Record
journal = Journal.open(Path(sys.argv[1]), {"seed": 0})
print("open", flush=True)
for number in range(int(sys.argv[2])):
    journal.append(Record("validation", Plan((number,)), (0, 1), (1.0, 0.5), 0.0))
    print(number, flush=True)
sys.stdin.read()
"""


def start_writer(folder, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_folder_in_use_is_refused_and_free_after_a_kill(tmp_path):
    with start_writer(tmp_path, 0) as writer:
        try:
            assert writer.stdout.readline() == "open\n"
            with pytest.raises(UserError, match=rf"another run is using .* \(process {writer.pid}\)") as raised:
                Journal.open(tmp_path, {"seed": 0})
            assert "\n" not in str(raised.value)
        finally:
            writer.kill()
    with Journal.open(tmp_path, {"seed": 0}):
        pass


def test_one_process_cannot_open_a_folder_twice(tmp_path):
    Journal.check_free(tmp_path)
    with Journal.open(tmp_path, CONFIG), pytest.raises(UserError, match="another run"):
        Journal.check_free(tmp_path)
    Journal.check_free(tmp_path)
    with Journal.open(tmp_path, CONFIG), pytest.raises(UserError, match="another run"):
        Journal.open(tmp_path, CONFIG)
    with Journal.open(tmp_path, CONFIG):
        pass


def test_what_was_appended_survives_a_kill(tmp_path):
    with start_writer(tmp_path, 10**6) as writer:
        try:
            said = [writer.stdout.readline() for _ in range(6)]
            assert said[-1] == "4\n"
        finally:
            writer.send_signal(signal.SIGKILL)
        # What it still said before it died counts as appended too.
        rest = writer.stdout.read()
        whole = len(rest[: rest.rindex("\n") + 1].splitlines()) if "\n" in rest else 0
    with Journal.open(tmp_path, {"seed": 0}) as journal:
        steps = journal.num_outcomes // 2
        assert steps >= 5 + whole
        assert all(journal.outcomes("validation", Plan((number,)), 2).tolist() == [1.0, 0.5] for number in range(steps))
        journal.append(Record("validation", Plan(), (0,), (1.0,), 0.0))


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    for folder in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(UserError, match="cannot write to the run folder"):
            Journal.open(folder, CONFIG)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path):
    # /proc takes no new names, not even from root.
    with pytest.raises(UserError, match="cannot write to the run folder /proc"):
        Journal.open(type(tmp_path)("/proc/self"), CONFIG)


def test_a_failing_header_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable_log.os, "fsync", full_disk)
        with pytest.raises(UserError, match="No space left"):
            Journal.open(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == ["journal.lock"]
    write(tmp_path)
    assert reopen(tmp_path) == (written(RECORDS), None)


@pytest.mark.parametrize("function", ["write", "fsync"])
def test_a_failing_append_leaves_the_journal_as_it_was(tmp_path, monkeypatch, function):
    path = write(tmp_path, RECORDS[:-1])
    before = path.read_bytes()
    real_write = os.write

    def half_write(descriptor, data):
        return real_write(descriptor, data[: len(data) // 2])

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with Journal.open(tmp_path, CONFIG) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(durable_log.os, function, half_write if function == "write" else full_disk)
            with pytest.raises(UserError, match=r"cannot write to the journal .*o space left"):
                journal.append(RECORDS[-1])
        assert path.read_bytes() == before
        assert content(journal) == written(RECORDS[:-1])
        journal.append(RECORDS[-1])
    assert reopen(tmp_path) == (written(RECORDS), None)


def test_every_append_is_synced(tmp_path, monkeypatch):
    events = []
    with Journal.open(tmp_path, CONFIG) as journal:
        real_write, real_sync = os.write, os.fsync
        monkeypatch.setattr(durable_log.os, "write", lambda fd, data: (events.append("write"), real_write(fd, data))[1])
        monkeypatch.setattr(durable_log.os, "fsync", lambda fd: (events.append("sync"), real_sync(fd))[1])
        for record in RECORDS[:2]:
            journal.append(record)
    assert events == ["write", "sync", "write", "sync"]


def test_the_other_processes_follow_the_first_ones_journal(tmp_path):
    write(tmp_path, RECORDS[:2])
    with Journal.open(tmp_path, CONFIG) as journal, Journal.follow(tmp_path, CONFIG) as follower:
        assert content(follower) == written(RECORDS[:2])
        before = (tmp_path / JOURNAL_NAME).read_bytes()
        follower.append(RECORDS[2])
        assert (tmp_path / JOURNAL_NAME).read_bytes() == before
        journal.append(RECORDS[2])
        assert content(follower) == content(journal) == written(RECORDS[:3])
        with pytest.raises(ValueError, match="repeats the evaluation"):
            follower.append(RECORDS[0])
        with pytest.raises(ValueError, match="finite"):
            follower.append(Record("validation", Plan(), (8,), (NAN,), 0.0))
    assert reopen(tmp_path)[0] == written(RECORDS[:3])
    assert sorted(os.listdir(tmp_path)) == ["journal.jsonl", "journal.lock"]


def test_only_a_journal_of_the_same_configuration_is_followed(tmp_path):
    with pytest.raises(UserError, match=f"cannot read .*{JOURNAL_NAME}"):
        Journal.follow(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == []
    write(tmp_path)
    with pytest.raises(UserError, match="seed was 0, is 1"):
        Journal.follow(tmp_path, CONFIG | {"seed": 1})


def test_a_linked_lock_empties_no_other_file(tmp_path):
    other = tmp_path / "precious"
    other.write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.lock").symlink_to(other)
    with pytest.raises(UserError, match="cannot write to the run folder"):
        Journal.open(tmp_path / "run", CONFIG)
    assert other.read_text() == "text"


def test_a_fifo_is_no_journal(tmp_path):
    os.mkfifo(tmp_path / JOURNAL_NAME)
    with pytest.raises(UserError, match="not a regular file"):
        Journal.open(tmp_path, CONFIG)
