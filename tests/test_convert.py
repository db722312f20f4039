"""The command `convert`: both directions bit for bit, bad input in one line, kills and restarts."""

import errno
import hashlib
import json
import random
import shutil
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlens_jax.checkpoints import conversion, leaves, orbax_store
from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.leaves import arrays_of
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.checkpoints.published import save_hf
from rlens_jax.commands.convert import main
from rlens_jax.console import run_command
from rlens_jax.errors import UserError
from rlens_jax.sharding.mesh import make_mesh
from tests.checkpoints import tiny

pytestmark = pytest.mark.slow

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def convert(*arguments: object) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=[str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refused conversion."""
    capsys.readouterr()
    assert convert(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("converting: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def make_source(folder: Path, shard_bytes: int = 3000, **overrides: object) -> Path:
    """A sharded checkpoint with tokenizer and processor files."""
    fields = tiny.fields(**overrides)
    save_hf(folder, tiny.model(fields, seed=4), fields, shard_bytes=shard_bytes)
    for name in ("tokenizer.json", "preprocessor_config.json", "LICENSE"):
        (folder / name).write_text(f"{{}} {name}")
    (folder / "pytorch_model.bin").write_bytes(b"never copied")
    return folder


def rewrite(folder: Path, edit) -> None:
    """Rewrite every shard with the tensors, names included, that `edit(name, array)` returns."""
    index = folder / "model.safetensors.index.json"
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = dict(edit(name, array) for name, array in load_file(file).items())
        save_file(tensors, file)
        weight_map |= dict.fromkeys(tensors, file.name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def contents(folder: Path) -> dict[str, tuple[str, str, tuple[int, ...], bytes]]:
    """File, dtype, shape and bytes of every tensor."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                array = opened.get_tensor(name)
                tensors[name] = (file.name, str(array.dtype), array.shape, array.tobytes())
    return tensors


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def source(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def round_trip(source: Path, folder: Path) -> Path:
    """Check that `source` comes back unchanged; return the converted folder."""
    converted, back = folder / "converted", folder / "back"
    assert convert(source, converted) == 0
    assert convert(converted, back, "--to-hf") == 0
    assert contents(back) == contents(source)
    small = {path.name for path in source.iterdir() if not path.match("*.safetensors*")} - {"pytorch_model.bin"}
    for name in small:
        assert (converted / name).read_bytes() == (back / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((back / "model.safetensors.index.json").read_text())
    before = contents(source)
    assert index["weight_map"] == {name: item[0] for name, item in before.items()}
    assert index["metadata"]["total_size"] == sum(len(item[3]) for item in before.values())
    assert {path.name for path in back.iterdir()} == small | {path.name for path in source.glob("*.safetensors*")}
    return converted


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
def test_round_trip(dtype: str, source: Path, tmp_path: Path) -> None:
    numbers = iter(range(1000))

    def narrow(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        chosen = list(DTYPES)[next(numbers) % 3] if dtype == "mixed" else dtype
        return name, array.astype(DTYPES[chosen])

    rewrite(source, narrow)
    converted = round_trip(source, tmp_path)
    for wanted in (jnp.float32, jnp.bfloat16):
        tiny.assert_same(load_model(converted, wanted)[1], load_model(source, wanted)[1])


def test_round_trip_of_the_newer_spelling(source: Path, tmp_path: Path) -> None:
    prefixes = {"model.": "model.language_model.", "visual.": "model.visual."}

    def newer(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        return prefixes.get(old, "") + name.removeprefix(old), array

    rewrite(source, newer)
    assert any(name.startswith("model.language_model.layers.2.") for name in contents(source))
    round_trip(source, tmp_path)


def test_tensors_that_are_not_used_are_carried_along_and_listed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def more(tensors: dict) -> None:
        tensors[INV_FREQ] = np.array([3, 1], np.int64)

    first = min(source.glob("*.safetensors"))
    tensors = load_file(first)
    more(tensors)
    save_file(tensors, first)
    converted = round_trip(source, tmp_path)
    assert f"copied, but not used by the model: {INV_FREQ} (rotary" in capsys.readouterr().err
    record = json.loads((converted / "conversion.json").read_text())
    assert [item["name"] for item in record["carried"]] == [INV_FREQ]


def test_a_tied_head_that_is_in_the_file_comes_back(tmp_path: Path) -> None:
    source = make_source(tmp_path / "model", tie_word_embeddings=True)
    files = {name: item[0] for name, item in contents(source).items()}
    embedding = load_file(source / files["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    last = max(source.glob("*.safetensors"))
    save_file(load_file(last) | {"lm_head.weight": embedding}, last)
    round_trip(source, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_of_ones_own(dtype: str, source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "converted", f"--dtype={dtype}") == 0
    assert convert(tmp_path / "converted", tmp_path / "back", "--to-hf") == 0
    before, after = contents(source), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, (_, _, shape, data) in before.items():
        expected = np.frombuffer(data, np.float32).reshape(shape).astype(DTYPES[dtype])
        assert after[name][1:] == (dtype, shape, expected.tobytes())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == dtype


def test_the_record(good: Path, tmp_path: Path) -> None:
    assert convert(good, tmp_path / "converted") == 0
    text = (tmp_path / "converted" / "conversion.json").read_text()
    record = json.loads(text)
    assert str(good.parent) not in text
    assert record["format"] == "rlens-conversion/1"
    assert record["source"] == {"name": "model", "revision": None}
    assert record["versions"]["jax"] == jax.__version__
    expected = {
        path.name: {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in good.iterdir()
        if path.name != "pytorch_model.bin"
    }
    listed = {item["name"]: item for item in record["files"]}
    assert listed == expected


def test_straight_into_a_mesh(good: Path, tmp_path: Path) -> None:
    assert convert(good, tmp_path / "converted") == 0
    mesh = make_mesh(jax.devices()[:1], 1)
    expected = load_model(good, jnp.bfloat16)[1]
    for folder in (good, tmp_path / "converted"):
        model = load_model(folder, jnp.bfloat16, mesh=mesh)[1]
        tiny.assert_same(model, expected)
        assert {array.sharding.mesh for array in arrays_of(model).values()} == {mesh}


def test_a_converted_folder_is_refused_as_source(good: Path, tmp_path: Path, capsys) -> None:
    assert convert(good, tmp_path / "converted") == 0
    assert "is converted already; --to-hf" in refusal(capsys, tmp_path / "converted", tmp_path / "again")
    assert "is not a converted folder" in refusal(capsys, good, tmp_path / "again", "--to-hf")
    (tmp_path / "converted" / "conversion.json").unlink()
    message = refusal(capsys, tmp_path / "converted", tmp_path / "again", "--to-hf")
    assert "conversion.json: no such file" in message


def test_another_format_of_the_record(good: Path, tmp_path: Path, capsys) -> None:
    assert convert(good, tmp_path / "converted") == 0
    path = tmp_path / "converted" / "conversion.json"
    path.write_text(path.read_text().replace("rlens-conversion/1", "rlens-conversion/2"))
    message = refusal(capsys, tmp_path / "converted", tmp_path / "back", "--to-hf")
    assert "'rlens-conversion/2', this version reads 'rlens-conversion/1'" in message


def test_source_equal_to_target_and_existing_target(source: Path, tmp_path: Path, capsys) -> None:
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    assert "is the source itself" in refusal(capsys, source, tmp_path / "link")
    (tmp_path / "there").mkdir()
    assert "there: exists already" in refusal(capsys, source, tmp_path / "there")
    assert contents(source) == before
    assert list((tmp_path / "there").iterdir()) == []


def nothing_left(source: Path) -> bool:
    """Whether the source's folder has no other files, not even hidden ones."""
    return list(source.parent.iterdir()) == [source]


def test_truncated_weights(source: Path, tmp_path: Path, capsys) -> None:
    file = max(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    message = refusal(capsys, source, tmp_path / "converted")
    assert f"{file}: not a complete safetensors file" in message
    file.unlink()
    assert f"{file}: no such file, though" in refusal(capsys, source, tmp_path / "converted")
    assert nothing_left(source)


def test_weights_that_are_no_numbers(source: Path, tmp_path: Path, capsys) -> None:
    def spoil(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        if name in ("model.norm.weight", "visual.merger.ln_q.bias"):
            array.reshape(-1)[-1] = -np.inf if name.startswith("model") else np.nan
        return name, array

    rewrite(source, spoil)
    capsys.readouterr()
    assert convert(source, tmp_path / "converted") == 2
    message = capsys.readouterr().err
    assert "2 problems with the weights" in message
    assert "model.norm.weight: holds NaN or infinite values" in message
    assert nothing_left(source)


def test_values_too_large_for_the_dtype(source: Path, tmp_path: Path, capsys) -> None:
    rewrite(source, lambda name, array: (name, array * (1e6 if name == "model.norm.weight" else 1)))
    capsys.readouterr()
    assert convert(source, tmp_path / "converted", "--dtype=float16") == 2
    assert "model.norm.weight: holds values too large for float16" in capsys.readouterr().err
    assert nothing_left(source)
    assert convert(source, tmp_path / "converted", "--dtype=bfloat16") == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"),
    ],
    ids=["Python", "TensorStore"],
)
def test_disk_full(error: Exception, source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    add, calls = orbax_store.Writer.add, []

    def full(writer: orbax_store.Writer, arrays: dict) -> None:
        calls.append(arrays)
        if len(calls) == 3:
            raise error
        add(writer, arrays)

    monkeypatch.setattr(orbax_store.Writer, "add", full)
    monkeypatch.setattr(leaves, "TOGETHER_BYTES", 1)
    assert "converted: the disk is full" in refusal(capsys, source, tmp_path / "converted")
    assert nothing_left(source)


def test_a_disk_that_is_too_small_is_reported_at_once(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    assert "the disk has 0.0 GB free" in refusal(capsys, source, tmp_path / "converted")
    assert nothing_left(source)


BAD = {
    "neither folder nor hub name": (["nowhere", "x"], "nowhere: no such folder"),
    "not in the offline cache": (["nobody/nothing", "x"], "nobody/nothing: no such folder, and the hub cannot provide it"),
    "no target": (["embedded"], "DST"),
    "unknown dtype": (["embedded", "x", "--dtype=float8"], "float8"),
    "misspelt option": (["embedded", "x", "--dtyp=float32"], "did you mean '--dtype'?"),
    "dtype on the way back": (["embedded", "x", "--to-hf", "--dtype=float32"], "takes no --dtype"),
    "revision of a folder": (["embedded", "x", "--revision=main"], "only a name on the hub has a --revision"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = BAD[case]
    assert expected in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def started(arguments: Sequence[object]) -> BaseProcess:
    """Run the command in a new process, a copy of one that has imported its modules and done nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["rlens_jax.commands.convert", "rlens_jax.checkpoints.conversion"])
    process = context.Process(target=run_command, args=(main,), kwargs={"argv": [str(argument) for argument in arguments]})
    process.start()
    return process


def partial_folders(folder: Path) -> list[Path]:
    return list(folder.glob(".converted.*.partial"))


def test_killed_at_random_moments_and_rerun(source: Path, tmp_path: Path) -> None:
    target, rng, kills = tmp_path / "converted", random.Random(5), 0
    for _ in range(3):
        old = set(partial_folders(tmp_path))
        process = started([source, target])
        # From the first folder on: a kill during the imports would try nothing.
        while process.is_alive() and not set(partial_folders(tmp_path)) - old:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        if target.exists():  # it was done already
            break
        kills += 1
        (left,) = partial_folders(tmp_path)  # that of the kill before is gone
        with pytest.raises(UserError, match="a killed conversion left this folder"):
            find_model(left)
        if not (left / "conversion.json").exists():
            renamed = Path(shutil.copytree(left, tmp_path / "renamed"))
            with pytest.raises(UserError):
                load_model(renamed, jnp.float32)
            shutil.rmtree(renamed)
    assert kills > 0
    if not target.exists():
        assert convert(source, target) == 0
    assert partial_folders(tmp_path) == []
    tiny.assert_same(load_model(target, jnp.float32)[1], load_model(source, jnp.float32)[1])


def test_a_conversion_at_work_is_left_alone(source: Path, tmp_path: Path, monkeypatch) -> None:
    """Of two conversions at the same time, the second does not disturb or overwrite the first."""
    finish, met = orbax_store.Writer.finish, []

    def other_one_first(writer: orbax_store.Writer) -> None:
        monkeypatch.setattr(orbax_store.Writer, "finish", finish)
        other = started([source, tmp_path / "converted"])
        other.join()
        met.append(other.exitcode)
        assert other.exitcode == 0
        finish(writer)

    monkeypatch.setattr(orbax_store.Writer, "finish", other_one_first)
    assert convert(source, tmp_path / "converted") == 2
    assert met == [0]
    assert partial_folders(tmp_path) == []
    tiny.assert_same(load_model(tmp_path / "converted", jnp.float32)[1], load_model(source, jnp.float32)[1])
