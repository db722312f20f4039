"""Text and JSON files, read with errors that name the file; files and folders, written whole or not at all."""

import errno
import fcntl
import glob
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rlens_jax.errors import UserError
from rlens_jax.mirrors import claimed, publish
from rlens_jax.stores import split_address

_LONGEST_MESSAGE = 160
LARGEST_TEXT = 32 * 2**20
_LONGEST_INTEGER = 40
"""Digits. Tokenizers write 10**30 for "no limit"."""
_LARGEST_NUMBER, _MOST_ITEMS, _MOST_ERRORS = 1e15, 300_000, 100
_DEEPEST = 64
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value", type(None): "null"}
_UNFINISHED = ".partial"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def json_text(value: Mapping[str, Any]) -> str:
    """JSON as this project writes it: indented, with a newline at the end. ValueError for NaN and infinities."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file so that readers find the old content or the new, never a part, even after a crash.

    A path that stands for an address (`rlens_jax.mirrors`) is written on the store first.

    Raises:
        UserError: the file cannot be written.
    """
    publish(path, content)
    return replace_local(path, content)


def replace_local(path: Path, content: bytes) -> Path:
    """`replace_file` on the local disk alone."""
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


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; a link is followed. UserError for anything else: a FIFO would block for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # NUL, or half of a surrogate pair, in the name
        raise UserError(f"cannot read {str(path)!r}: not a file name ({error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"cannot read {path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, limit: int = LARGEST_TEXT) -> str:
    """The text of a UTF-8 file of at most `limit` bytes, with or without a byte order mark. UserError if it cannot be read."""
    with open_file(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > limit:
        raise UserError(f"{path}: longer than the {limit:,} bytes that are read of such a file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error


def read_json(path: Path, limit: int = LARGEST_TEXT) -> Any:
    """The value of a JSON file of at most `limit` bytes. UserError when it cannot be read or `parse_json` refuses it."""
    return parse_json(read_text(path, limit), path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The fields of a JSON file that holds an object. UserError as `read_json`, or when it holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {_KINDS[type(value)]}")
    return value


def parse_json(text: str | bytes, where: Path | str, number: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text, which ordinary code can use: floats are finite, strings can be encoded.

    Args:
        text: UTF-8 if it is bytes.
        where: the source, the beginning of every error.
        number: makes the value of a number from its text; by default an int or a float.

    Raises:
        UserError: the text is not valid JSON; has NaN, an infinity or a longer number than any real one; names a field of an
            object twice; is nested too deeply; or has a string with NUL or half of a surrogate pair.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = Counter(name for name, _ in pairs)
            raise UserError(f"{where}: field {shortened(names.most_common(1)[0][0])!r} is given twice")
        return fields

    def constant(name: str) -> NoReturn:
        raise UserError(f"{where}: not valid JSON: {name} is not a number")

    def integer(digits: str) -> int:
        if len(digits) > _LONGEST_INTEGER:
            raise UserError(f"{where}: a number of {len(digits)} digits is too long")
        return int(digits)

    def real(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise UserError(f"{where}: the number {shortened(digits)} is too large")
        return value

    try:
        decoded = text if isinstance(text, str) else text.decode()
        numbers = number or integer, number or real
        value = json.loads(
            decoded, object_pairs_hook=unique, parse_constant=constant, parse_int=numbers[0], parse_float=numbers[1]
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg}, line {error.lineno} character {error.colno}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from error
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: too deeply nested") from None
    for field, item in _items(value, where):
        string = "".join(item) if isinstance(item, dict) else item
        if isinstance(string, str):
            check_text(string, f"{where}: field {shortened(field)!r}" if field else where)
    return value


def check_text(text: str, where: Path | str) -> None:
    """Raise UserError, beginning with `where`, if a text has NUL or half of a surrogate pair, which cannot be written."""
    if "\0" in text or _SURROGATE.search(text):
        raise UserError(f"{where}: {shortened(ascii(text))} has NUL or half of a surrogate pair")


def _items(value: Any, where: Path | str) -> Iterator[tuple[str, Any]]:
    """All items of nested lists and objects, and their dotted names. UserError if they are nested too deeply."""
    level = [("", value)]
    for _ in range(_DEEPEST):
        yield from level
        children: list[tuple[str, Any]] = []
        for field, item in level:
            if isinstance(item, dict):
                children += ((f"{field}.{name}" if field else name, child) for name, child in item.items())
            elif isinstance(item, list):
                children += ((f"{field}[{index}]", child) for index, child in enumerate(item))
        if not children:
            return
        level = children
    raise UserError(f"{where}: not valid JSON: too deeply nested")


def shortened(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """A text for messages: the middle of a long one is left out."""
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-(longest // 2) :]}"


def quoted(value: Any) -> str:
    """A foreign value for messages: as Python writes it, `shortened`."""
    return shortened(repr(value))


def check_schema(value: Any, schema: Path, path: Path) -> None:
    """Raise UserError, naming `path` and the field, unless a JSON value follows the JSON schema in the file `schema`.

    Numbers above 1e15 are refused: results with them are of no run, and sums of them overflow. So are more than 300,000 items,
    three times those of a search over 80 layers: to check them all takes minutes.
    """
    for number, (field, item) in enumerate(_items(value, path)):
        if number == _MOST_ITEMS:
            raise UserError(f"{path}: has more than {_MOST_ITEMS:,} values, so it is no such file")
        if isinstance(item, int | float) and abs(item) > _LARGEST_NUMBER:
            raise field_error(path, field, f"the number {item} is too large")
    # Imported here: few commands check a schema, and all of them import this module to start.
    from jsonschema.exceptions import best_match

    error = best_match(islice(_validator(schema).iter_errors(value), _MOST_ERRORS))
    if error is not None:
        message = shortened(" ".join(error.message.split()))  # it begins with the whole wrong value
        raise field_error(path, error.json_path.removeprefix("$").removeprefix("."), message)


def field_error(path: Path, field: str, message: str) -> UserError:
    """The error for a wrong field of a JSON file; `field` is "" for the whole file."""
    return UserError(f"{path}: {field}: {message}" if field else f"{path}: {message}")


@cache
def _validator(schema: Path) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    # The standard takes 3.0 for an integer, Python does not.
    types = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return extend(Draft202012Validator, type_checker=types)(json.loads(schema.read_text(encoding="utf-8")))


def json_leaves(value: Any, name: str = "") -> dict[str, str]:
    """JSON text of every leaf of nested objects, by dotted name."""
    if isinstance(value, dict) and value:
        leaves: dict[str, str] = {}
        for key, child in value.items():
            leaves |= json_leaves(child, f"{name}.{key}" if name else key)
        return leaves
    return {name: json.dumps(value)}


def check_local(name: str, place: str | Path) -> None:
    """Raise UserError, beginning with `name`, for an address such as gs://bucket/folder."""
    if split_address(str(place)) is not None:
        raise UserError(f"{name} is {place}: it must be a local path")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling to write into, which is renamed to `folder` at the end.

    The sibling of a killed process stays until the next call for the same folder removes it. A sibling is locked while its
    process lives, on whatever host. A folder that stands for an address (`rlens_jax.mirrors`) is uploaded and then removed.

    Raises:
        UserError: `folder` exists or cannot be created, or the disk is full.
    """
    with claimed(folder), _new_local_folder(folder.absolute()) as partial:
        yield partial


@contextmanager
def _new_local_folder(folder: Path) -> Iterator[Path]:
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
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.*{_UNFINISHED}"):
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
