"""Reading what transformers loads from a published model folder."""

from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from rlens_jax.errors import UserError

PROCESSOR_FILE = "preprocessor_config.json"

Loaded = TypeVar("Loaded")
Loaded_co = TypeVar("Loaded_co", covariant=True)


@runtime_checkable
class Loader(Protocol[Loaded_co]):
    """A class of transformers that reads its objects from a folder."""

    def from_pretrained(self, folder: Path, *, local_files_only: bool) -> Loaded_co: ...


def read_folder(loader: Loader[Loaded], folder: Path, content: str) -> Loaded:
    """Read an object of a transformers class from a model folder, without network or remote code.

    Raises:
        UserError: the files are missing or cannot be read; `content` names the file or what several files hold together.
    """
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise errors of many types for broken files, some of them bare exceptions
        raise unusable(folder, content, error) from None


def unusable(folder: Path, content: str, error: Exception) -> UserError:
    """The one-line message for files that a library could not read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{folder}: no usable {content} ({reason}); copy the files of the published model beside config.json")
