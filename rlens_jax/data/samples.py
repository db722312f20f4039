"""What every data source hands out, and the only way an image is opened."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rlens_jax.errors import UserError

MAX_IMAGE_PIXELS = 100_000_000
"""Default limit on width x height of an image file: far above any photo, and 300 MB when decoded."""

IMAGE_MARK = "<image>"
"""Where in a question an image goes."""

# Our limit replaces Pillow's, whose warning from 89 million pixels on would only add noise. Pillow's check
# reads this module variable at each call, so setting it for one image only would race with other threads.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Sample:
    """One question about one or more images.

    id: unique in the run, e.g. "pages_read/validation/000012" or "my.jsonl:17".
    images: encoded image files, as bytes or as the path of the file.
    question: "<image>" marks say where each image goes; without marks the images come first.
    answers: any of them is right.
    """

    id: str
    dataset: str
    images: tuple[bytes | Path, ...]
    question: str
    answers: tuple[str, ...]


def load_image(source: bytes | Path, sample_id: str, max_pixels_allowed: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image file to an RGB image of the size its file states.

    The size is checked from the header, before anything is decoded. The EXIF orientation is not applied,
    nor do the Hugging Face processors apply it to an opened image (given a path, transformers 5.23 does).

    Raises UserError, naming `sample_id` and the file, when the image is missing, unreadable or larger than
    `max_pixels_allowed` (width x height).
    """
    what = f"{sample_id}: image {source}" if isinstance(source, Path) else f"{sample_id}: image"
    with _opened(source, what, max_pixels_allowed) as opened:
        try:
            if opened.mode == "P":
                # Same colours as going to RGB at once, without Pillow's warning about transparent palettes.
                return opened.convert("RGBA").convert("RGB")
            return opened.convert("RGB")
        except Exception as error:
            raise UserError(f"{what} cannot be decoded: {_first_line(error)}") from error


def check_image(content: bytes, what: str, max_pixels_allowed: int = MAX_IMAGE_PIXELS) -> None:
    """UserError, beginning with `what`, unless the file's header is that of an image that is not too large.

    Nothing is decoded.
    """
    _opened(content, what, max_pixels_allowed).close()


def _opened(source: bytes | Path, what: str, max_pixels_allowed: int) -> Image.Image:
    """An image of which only the header is read yet."""
    try:
        opened = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
    except FileNotFoundError:
        raise UserError(f"{what} does not exist") from None
    # Pillow's decoders raise errors of nearly every type for broken files, not only OSError.
    except Exception as error:
        raise UserError(f"{what} cannot be read: {_first_line(error)}") from error
    width, height = opened.size
    if width * height > max_pixels_allowed:
        opened.close()
        raise UserError(
            f"{what} has {width} x {height} = {width * height} pixels, more than the "
            f"{max_pixels_allowed} allowed; make it smaller"
        )
    return opened


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
