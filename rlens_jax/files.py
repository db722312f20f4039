"""Text and JSON files, read with errors that name the file; files and folders, written whole or not at all."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from rlens_jax.errors import UserError

_LONGEST_MESSAGE = 160
_UNFINISHED = ".partial"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def json_text(value: Mapping[str, Any]) -> str:
    """JSON as this project writes it: indented, with a newline at the end. ValueError for NaN and infinities."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file so that readers find the old content or the new, never a part, even after a crash.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink()
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. UserError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file. UserError when it cannot be read or `parse_json` refuses it."""
    return parse_json(read_text(path), path)


def parse_json(text: str, where: Path | str) -> Any:
    """The value of a JSON text; errors begin with `where`.

    Raises:
        UserError: the text is not valid JSON, has NaN or an infinity, or names a field of an object twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: field {repeated!r} is given twice")
        return fields

    def refuse(constant: str) -> NoReturn:
        raise UserError(f"{where}: not valid JSON: {constant} is not a number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg}, line {error.lineno} character {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON: too deeply nested") from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{where}: not readable as JSON: {error}") from error


def check_schema(value: Any, schema: Path, path: Path) -> None:
    """Raise UserError, naming `path` and the field, unless a JSON value follows the JSON schema in the file `schema`."""
    # Imported here: few commands check a schema, and all of them import this module to start.
    from jsonschema.exceptions import best_match

    error = best_match(_validator(schema).iter_errors(value))
    if error is not None:
        message = " ".join(error.message.split())
        if len(message) > _LONGEST_MESSAGE:  # it begins with the whole wrong value
            message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
        raise field_error(path, error.json_path.removeprefix("$").removeprefix("."), message)


def field_error(path: Path, field: str, message: str) -> UserError:
    """The error for a wrong field of a JSON file; `field` is "" for the whole file."""
    return UserError(f"{path}: {field}: {message}" if field else f"{path}: {message}")


@cache
def _validator(schema: Path) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))


def json_leaves(value: Any, name: str = "") -> dict[str, str]:
    """JSON text of every leaf of nested objects, by dotted name."""
    if isinstance(value, dict) and value:
        leaves: dict[str, str] = {}
        for key, child in value.items():
            leaves |= json_leaves(child, f"{name}.{key}" if name else key)
        return leaves
    return {name: json.dumps(value)}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling to write into, which is renamed to `folder` at the end.

    The sibling of a killed process stays until the next call for the same folder removes it. A sibling is locked while its
    process lives, on whatever host.

    Raises:
        UserError: `folder` exists or cannot be created, or the disk is full.
    """
    folder = folder.absolute()
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder or remove it")
    partial = folder.parent / f".{folder.name}.{os.getpid()}{_UNFINISHED}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror})") from None
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
        _sync_files(partial)
        if folder.exists():
            raise UserError(f"{folder}: another process created it meanwhile; name a new folder or remove it")
        partial.rename(folder)
        _sync_names(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            raise UserError(f"{folder}: the disk is full; nothing was kept, free some space first") from None
        raise
    finally:
        os.close(lock)


def is_unfinished(folder: Path) -> bool:
    """Whether `new_folder` is writing this folder, or was when its process was killed."""
    return folder.name.startswith(".") and folder.name.endswith(_UNFINISHED)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left of earlier attempts at `folder`."""
    for partial in folder.parent.glob(f".{folder.name}.*{_UNFINISHED}"):
        lock = os.open(partial, os.O_RDONLY)
        try:
            with suppress(BlockingIOError):  # locked: its process is alive
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial)
        finally:
            os.close(lock)


def _is_disk_full(error: BaseException) -> bool:
    """Whether this is Python's error for a full disk or TensorStore's, which has the error code in its text only."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    return isinstance(error, ValueError) and any(f"os_error_code='{code}'" in str(error) for code in _DISK_FULL)


def _sync_files(folder: Path) -> None:
    """Flush all files of `folder` to disk, so that a power cut leaves no finished name on empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
