"""Objects on remote stores, by address: `gs://bucket/name`, and any other scheme that fsspec knows.

Nothing else in the package uses fsspec. Each operation is tried again after a failure that may pass, and at last raises a
UserError of one line that begins with the address. Objects are written whole or not at all; stores cannot append or rename.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from rlens_jax.errors import UserError

T = TypeVar("T")

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)
"""A scheme has two letters or more: one is a drive. pathlib joins the slashes behind it."""
_NO_STORES = ("file", "local", "http", "https")
_WAITS = (0.2, 0.8, 3.2)
"""Seconds before the second try, and so on."""
_LONGEST = 20.0
"""Seconds after which nothing is tried again: some file systems of fsspec wait and try again themselves."""
_AT_ONCE = 16
"""Requests at the same time."""
_BLOCK = 2**24
_VERSIONS = ("generation", "ETag", "etag", "version_id", "mtime", "LastModified", "created")
"""What the file systems of fsspec call the version of an object, the exact ones first."""
_EXTRAS = {"gs": "rlens-jax[gcs]", "gcs": "rlens-jax[gcs]", "s3": "s3fs"}


@dataclass(frozen=True)
class Stored:
    """An object as a listing shows it. `version` changes whenever the object is written."""

    name: str
    """Relative to the address that was listed."""
    size: int
    version: str


def split_address(text: str) -> tuple[str, str] | None:
    """The scheme of an address, and what follows it without slashes at the end; None for the name of a local file or folder.

    UserError for an address with one slash, of which a local folder called `gs:` would be made.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return None
    if match[2] == "/":
        raise UserError(f"{text}: {match[1]}://bucket/folder has two slashes")
    return match[1], match[3].rstrip("/")


def listed(address: str, *, deep: bool = True) -> list[Stored]:
    """The objects under an address, sorted; without those in folders of it unless `deep`."""

    def work(system: Any, name: str) -> list[Stored]:
        try:
            found = system.find(name, detail=True).values() if deep else system.ls(name, detail=True)
        except FileNotFoundError:
            return []
        infos = {info["name"].removeprefix(name).removeprefix("/"): info for info in found if info["type"] == "file"}
        return sorted((_stored(path, info) for path, info in infos.items() if path), key=lambda item: item.name)

    return _tried(address, work)


def found(address: str) -> Stored | None:
    """The object at an address, None if there is none."""

    def work(system: Any, name: str) -> Stored | None:
        try:
            info = system.info(name)
        except FileNotFoundError:
            return None
        return _stored("", info) if info["type"] == "file" else None

    return _tried(address, work)


def _stored(name: str, info: dict[str, Any]) -> Stored:
    version = next((str(info[field]) for field in _VERSIONS if info.get(field)), "")
    return Stored(name, int(info["size"] or 0), version)


def read(address: str) -> bytes | None:
    """The content of an object, None if there is none."""

    def work(system: Any, name: str) -> bytes | None:
        try:
            return system.cat_file(name)
        except FileNotFoundError:
            return None

    return _tried(address, work)


def download(address: str, path: Path) -> None:
    """Copy an object to a local file, which a failure may leave half-written."""
    _tried(address, lambda system, name: system.get_file(name, str(path)))


def sha256(address: str) -> str:
    """The SHA-256, in hex, of an object, which is read in pieces."""

    def work(system: Any, name: str) -> str:
        with system.open(name, "rb", block_size=_BLOCK, cache_type="readahead") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return _tried(address, work)


def put(address: str, content: bytes) -> None:
    """Write an object, or replace it."""
    _tried(address, lambda system, name: system.pipe_file(name, content))


def put_new(address: str, content: bytes) -> bool:
    """Write an object that must not exist yet; whether the object now has this content. One that has another stays."""

    def work(system: Any, name: str) -> bool:
        try:
            system.pipe_file(name, content, mode="create")
        except FileExistsError:  # a first try may have succeeded though its answer was lost
            return bool(system.cat_file(name) == content)
        return True

    return _tried(address, work)


def upload(path: Path, address: str) -> None:
    """Write an object with the content of a local file."""
    _tried(address, lambda system, name: system.put_file(str(path), name))


def delete(address: str) -> None:
    """Delete an object, if there is one."""

    def work(system: Any, name: str) -> None:
        with suppress(FileNotFoundError):
            system.rm_file(name)

    _tried(address, work)


def for_each(work: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """The results of `work`, one of the functions above, several at the same time; as `map`."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(work, *arguments))


@cache
def _system(scheme: str) -> Any:
    """The file system of a scheme. UserError if there is none, or a package is missing."""
    # Buckets of one zone need gRPC; without it, no request asks for the kind of each bucket.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs each failure with its traceback
    # Imported here: it takes a second, and only runs with remote data need it.
    import fsspec

    if scheme not in fsspec.available_protocols() or scheme in _NO_STORES:
        raise UserError(f"{scheme}://: not a kind of store that can be used; name a local path, without a scheme")
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        package = _EXTRAS.get(scheme)
        remedy = f"pip install '{package}'" if package else str(error)
        raise UserError(f"{scheme}://: the package for this kind of store is missing: {remedy}") from None
    except Exception as error:
        raise UserError(f"{scheme}://: cannot be used ({_reason(error)})") from None


def _tried(address: str, work: Callable[[Any, str], T]) -> T:
    """The result of `work` on the file system and the name in it; a failure that may pass is tried again."""
    split = split_address(address)
    assert split is not None
    scheme, name = split
    system, start, waits = _system(scheme), time.monotonic(), iter(_WAITS)
    while True:
        try:
            return work(system, name)
        except (UserError, TypeError, AttributeError, AssertionError):  # the last three are errors in a program
            raise
        except Exception as error:  # fsspec's file systems raise errors of many packages
            if _denies(error):
                raise UserError(
                    f"{address}: no permission on the store ({_reason(error)}); sign in with an account that may read and write "
                    "there (for gs://: gcloud auth application-default login, or a service account with the role Storage Object "
                    "User), or name another address"
                ) from None
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{address}: there is no such bucket or object on the store") from None
            wait = next(waits, None)
            if wait is None or time.monotonic() - start > _LONGEST:
                raise UserError(
                    f"{address}: the store failed several times ({_reason(error)}); what is finished is kept, start the same "
                    "command again"
                ) from None
            time.sleep(wait)


def _denies(error: Exception) -> bool:
    from_login = type(error).__module__.startswith("google.auth")
    by_server = getattr(error, "code", None) in (401, 403) or str(error).startswith("Forbidden")
    return isinstance(error, PermissionError) or from_login or by_server


def _reason(error: Exception) -> str:
    """An error in one line: some have the server's answer in further lines."""
    return " ".join(str(error).split())[:160] or type(error).__name__
