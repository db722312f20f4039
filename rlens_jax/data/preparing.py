"""Prepare a tensorflow-dataset once, in one of several processes."""

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rlens_jax.errors import UserError


def prepared(make: Callable[[], Any], name: str, data_dir: Path, manual_dir: Path | None = None) -> Any:
    """A builder whose files are on disk; they are made if necessary.

    Files of a killed preparation are not used. While one process prepares, others wait.

    Args:
        make: makes the builder, for files in `data_dir`.
        name: name of the dataset, for errors.
        data_dir: folder of the prepared files.
        manual_dir: folder of the files that the builder reads, if any.

    Raises:
        UserError: `data_dir` cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        builder = make()
        if Path(builder.data_path).exists():
            return builder
        # tfds writes to a temporary folder and renames it, which fails for the second of two processes. The
        # operating system drops the lock when the process that holds it ends.
        with open(data_dir / f".{builder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Made again: another process may have finished while this one waited.
            builder = make()
            for leftover in Path(builder.data_path).parent.glob("incomplete.*"):
                shutil.rmtree(leftover)
            tfds.disable_progress_bar()
            with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(None):
                # tfds prints a message about downloads and makes a folder for them, although nothing is downloaded.
                builder.download_and_prepare(
                    download_dir=downloads, download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
                )
    except OSError as error:
        raise UserError(f"{name} cannot be prepared in {data_dir}: {error}") from error
    return builder
