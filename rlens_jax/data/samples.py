"""`Sample`, the output of every data source, and `load_image`, the only function that decodes an image."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rlens_jax.errors import UserError

MAX_IMAGE_PIXELS = 100_000_000
"""Limit of width x height of an image: far above any photo, and 300 MB when decoded."""

IMAGE_MARK = "<image>"
"""Marks the place of an image in a question."""

# Our limit replaces Pillow's, which warns from 89 million pixels on. Pillow reads this module variable at each call, so
# setting it for one image only would race with other threads.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Sample:
    """One question about one or more images.

    Attributes:
        id: unique in the run, such as "pages_read/validation/000012" or "my.jsonl:17".
        dataset: name of the dataset.
        images: encoded image files, as bytes or as paths.
        question: "<image>" marks the places of the images; without marks the images come first.
        answers: right answers.
    """

    id: str
    dataset: str
    images: tuple[bytes | Path, ...]
    question: str
    answers: tuple[str, ...]


def load_image(source: bytes | Path, sample_id: str) -> Image.Image:
    """Decode an image file to RGB, in the size that its header states.

    The size is checked before anything is decoded. The EXIF orientation is not applied: the Hugging Face processors do
    not apply it to an opened image either (transformers 5.23 applies it when it opens the file itself).

    Raises:
        UserError: naming `sample_id` and the file: the image is missing, unreadable or has more than `MAX_IMAGE_PIXELS`.
    """
    what = f"{sample_id}: image {source}" if isinstance(source, Path) else f"{sample_id}: image"
    with _opened(source, what) as opened:
        try:
            if opened.mode == "P":
                # The same colours as converting to RGB at once, without Pillow's warning about transparent palettes.
                return opened.convert("RGBA").convert("RGB")
            return opened.convert("RGB")
        except Exception as error:
            raise UserError(f"{what} cannot be decoded: {_first_line(error)}") from error


def check_image(content: bytes, what: str) -> None:
    """Check type and size of an image file by its header only. UserError, beginning with `what`, if `load_image` refuses it."""
    _opened(content, what).close()


def _opened(source: bytes | Path, what: str) -> Image.Image:
    """An opened image; only its header has been read."""
    try:
        opened = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
    except FileNotFoundError:
        raise UserError(f"{what} does not exist") from None
    # Pillow's decoders raise errors of nearly every type for broken files, not only OSError.
    except Exception as error:
        raise UserError(f"{what} cannot be read: {_first_line(error)}") from error
    width, height = opened.size
    if width * height > MAX_IMAGE_PIXELS:
        opened.close()
        pixels = f"{width} x {height} = {width * height} pixels"
        raise UserError(f"{what} has {pixels}, more than the {MAX_IMAGE_PIXELS} allowed; make it smaller")
    return opened


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
