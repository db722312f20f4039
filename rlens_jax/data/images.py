"""Images, from an encoded file to the RGB pixels that a model family reads. Nothing else decodes an image for a model.

| file | pixels |
|---|---|
| transparency | composited on white, as transformers does with an opened image, or dropped (`Transparency`) |
| grey with 16 bits | scaled by 1/257; transformers clips it, so this is said once |
| 32-bit integers, floats | refused: they have no largest value |
| EXIF orientation | applied, unless the sample is `as_stored` |
| GIF, WebP, PNG with several frames | the first one |

Formats are the listed ones: Pillow reads many more, some of them with large and rarely used parsers.
"""

import hashlib
import io
import logging
import math
import os
import random
import re
import stat
import sys
import tempfile
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from rlens_jax.console import say
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.files import open_file, shortened

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_IMAGE_PIXELS = 100_000_000
"""Limit of width x height of an image: far above any photo, and 300 MB when decoded."""

Transparency = Literal["white", "dropped"]
"""What a model family does with transparent pixels: composites them on white, or drops the transparency."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation."""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that exchange width and height."""
_OTHER_FORMATS = ((b"%PDF", "PDF"), (b"<svg", "SVG"), (b"<?xml", "XML"), (b"\xff\x0a", "JPEG XL"), (b"ftyphei", "HEIC"))
"""Beginnings of files that Pillow has no reader for."""
_VIDEO_FORMATS = (
    (b"ftyp", "MP4"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM"),
    (b"AVI LIST", "AVI"),
    (b"\0\0\x01\xba", "MPEG"),
    (b"\0\0\x01\xb3", "MPEG"),
    (b"FLV\x01", "FLV"),
    (b"OggS", "Ogg"),
    (b"0&\xb2u\x8ef\xcf\x11", "WMV"),
)
"""The same of videos. HEIC and AVIF are of MP4's kind, but are known before."""
ENLARGED_AREA = 1344**2
"""Pixels up to which `enlarged` enlarges."""
_TIFF_ERROR = re.compile(r"[\w.]+: .+")
"""A line that libtiff prints about a damaged file."""

# Our limit replaces Pillow's, which warns from 89 million pixels on. Pillow reads this module variable at each call, so
# setting it for one image only would race with other threads.
Image.MAX_IMAGE_PIXELS = None
# Python prints messages of a logger that nobody has configured.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def load_images(sample: Sample, transparency: Transparency) -> list[Image.Image]:
    """The images of a sample, decoded to RGB, each upright and with transparency as the model family reads it.

    A sample that is `as_stored` is read as VLMEvalKit reads it: no orientation is applied, and transparency is dropped.

    Raises:
        UserError: naming the sample and the file, as `load_image`.
    """
    read: Transparency = "dropped" if sample.as_stored else transparency
    return [load_image(source, f"{sample.id}: image", read, upright=not sample.as_stored) for source in sample.images]


def load_image(source: bytes | Path, what: str, transparency: Transparency, *, upright: bool) -> Image.Image:
    """Decode an image file to RGB.

    The size is checked before anything is decoded. Warnings of the decoders are not printed.

    Args:
        source: the encoded file.
        what: the beginning of error messages.
        transparency: what becomes of transparent pixels.
        upright: whether the EXIF orientation is applied.

    Raises:
        UserError: the file is missing, unreadable, damaged, of another format than `FORMATS`, of a pixel type without a largest
            value, or has more than `MAX_IMAGE_PIXELS` pixels.
    """
    what = f"{what} {shortened(str(source))}" if isinstance(source, Path) else what
    with _opened(source, what) as image:
        try:
            with _damage_raises(image):
                image.load()
            orientation = _orientation(image) if upright else 1
            pixels = _rgb(image, transparency)
        except UserError as error:
            raise UserError(f"{what} {error}") from None
        # Pillow's decoders raise errors of nearly every type for broken files, not only OSError.
        except Exception as error:
            raise UserError(f"{what} cannot be decoded: {_first_line(error)}") from error
        return pixels.transpose(_TURNS[orientation]) if orientation in _TURNS else pixels


def recompressed(source: bytes, what: str) -> bytes:
    """The image as a JPEG file of Pillow's usual quality, as VLMEvalKit writes images of large files and wrote all until 2026.

    The orientation is lost, and transparency is dropped. Errors as of `load_image`.
    """
    file = io.BytesIO()
    load_image(source, what, "dropped", upright=False).save(file, "JPEG")
    return file.getvalue()


def doubled(source: bytes | Path, what: str) -> bytes:
    """The image with twice its width and height, bilinear, as a PNG file: the first one of each question of MMMU to InternVL in
    VLMEvalKit. The orientation is lost, and transparency is dropped. Errors as of `load_image`, or it becomes too large.
    """
    image = load_image(source, what, "dropped", upright=False)
    return _resized(image, (2 * image.width, 2 * image.height), Image.Resampling.BILINEAR, what)


def enlarged(source: bytes | Path, what: str, seed: str) -> bytes:
    """The image as MiniCPM-V sees it on some benchmarks of VLMEvalKit: one below 1344² pixels with a random larger width.

    VLMEvalKit draws widths from one stream for all questions of a process (our decision: from `seed` for each). As `doubled`.
    """
    image = load_image(source, what, "dropped", upright=False)
    width, height = image.size
    if width * height < ENLARGED_AREA:
        largest = int(width * math.sqrt(ENLARGED_AREA / (width * height)))
        drawn = random.Random(seed).randint(width, largest)
        width, height = drawn, int(drawn / width * height)
    return _resized(image, (width, height), Image.Resampling.BICUBIC, what)


def _resized(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling, what: str) -> bytes:
    """The image with this width and height as a PNG file."""
    if math.prod(size) > MAX_IMAGE_PIXELS:
        raise UserError(f"{what} has {size[0]} x {size[1]} pixels when enlarged, more than the {MAX_IMAGE_PIXELS} allowed")
    file = io.BytesIO()
    image.resize(size, resampling).save(file, "PNG", compress_level=1)
    return file.getvalue()


def image_dimensions(source: bytes | Path, what: str, *, upright: bool) -> tuple[int, int]:
    """Width and height in pixels, from an image file's header; arguments and errors as of `load_image`."""
    with _opened(source, what) as image:
        width, height = image.size
        turned = upright and _orientation(image) in _SIDEWAYS
        return (height, width) if turned else (width, height)


def check_image(content: bytes, what: str) -> None:
    """Check type and size of an image file by its header only. UserError, beginning with `what`, if `load_image` refuses it."""
    with _opened(content, what):
        pass


def image_file(name: str, folder: Path, what: str) -> Path:
    """The image file that a user names, relative to `folder`.

    Raises:
        UserError: beginning with `what`; a URL, image data in place of a name, or not the name of a regular file.
    """
    if name.lower().startswith("data:"):
        raise UserError(f"{what} is a data URL; write the image to a file and name that file")
    if re.match(r"\w+://", name):
        raise UserError(f"{what} is a URL ({shortened(name)}); download the image and name its file")
    path = folder / name
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # a ValueError for NUL or half of a surrogate pair
        hint = "; image data must be in a file" if re.fullmatch(r"[\w+/=\s-]{200,}", name) else ""
        raise UserError(f"{what}: no such file: {shortened(str(path))}{hint}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{what}: not a regular file: {shortened(str(path))}")
    return path


def image_hash(source: bytes | Path, sample_id: str) -> bytes:
    """SHA-256 of an encoded image file. UserError, naming `sample_id`, if the file cannot be read."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    digest = hashlib.sha256()
    with _file(source, f"{sample_id}: image") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()


def images_key(sample: Sample) -> tuple[Hashable, ...]:
    """Equal for samples whose images have equal contents and are read in the same way; empty without images.

    Raises:
        UserError: an image file cannot be read.
    """
    return (sample.as_stored, *(image_hash(image, sample.id) for image in sample.images)) if sample.images else ()


def image_size(source: bytes | Path, sample_id: str) -> int:
    """Bytes of an encoded image file. UserError, naming `sample_id`, if there is no such file."""
    try:
        return len(source) if isinstance(source, bytes) else source.stat().st_size
    except (OSError, ValueError) as error:
        raise UserError(f"{sample_id}: image: cannot read {shortened(str(source))} ({error})") from None


@contextmanager
def _opened(source: bytes | Path, what: str) -> Iterator[Image.Image]:
    """An opened image, of which only the header has been read."""
    with _file(source, what) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=FORMATS)
        except Exception as error:
            raise UserError(f"{what} {_why_not(file, error)}") from error
        with image:
            width, height = image.size
            if not width * height:
                raise UserError(f"{what} has no pixels")
            if width * height > MAX_IMAGE_PIXELS:
                pixels = f"{width} x {height} = {width * height} pixels"
                raise UserError(f"{what} has {pixels}, more than the {MAX_IMAGE_PIXELS} allowed; make it smaller")
            yield image


def _file(source: bytes | Path, what: str) -> io.BytesIO | BinaryIO:
    try:
        return io.BytesIO(source) if isinstance(source, bytes) else open_file(source)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _why_not(file: io.BytesIO | BinaryIO, error: Exception) -> str:
    """Why Pillow cannot open a file: another format, by name if it is known, or damage."""
    file.seek(0)
    if not (prefix := file.read(16)):
        return "is an empty file"
    names = [name for start, name in _OTHER_FORMATS if start in prefix]
    Image.init()
    names += [name for name, (_, accept) in Image.OPEN.items() if accept is not None and accept(prefix.ljust(16, b"\0")) is True]
    if names in ([], ["MPEG"]) and (videos := [name for start, name in _VIDEO_FORMATS if start in prefix]):
        return f"is a video ({videos[0]}); videos are not supported, only images"
    if not names:
        return f"is not an image: it begins like no known format; supported are {', '.join(FORMATS)}"
    if names[0] not in FORMATS:
        return f"is a file of the format {names[0]}; convert it to one of {', '.join(FORMATS)}"
    # The text of this error is about our buffer.
    reason = "" if isinstance(error, UnidentifiedImageError) else f": {_first_line(error)}"
    return f"is a damaged {names[0]} file{reason}"


@contextmanager
def _damage_raises(image: Image.Image) -> Iterator[None]:
    """Let damage of a TIFF file raise OSError: libtiff prints about it to the process's stderr, and returns any pixels."""
    if image.format != "TIFF":
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        printed.seek(0)
        lines = printed.read().decode(errors="replace").splitlines()
    if complaints := [line for line in lines if _TIFF_ERROR.fullmatch(line)]:
        raise OSError(complaints[0])


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data say nothing about the pixels
        return 1


def _rgb(image: Image.Image, transparency: Transparency) -> Image.Image:
    if image.mode.startswith("I;16"):
        _say_once("note: grey images with 16 bits are scaled to 8 bits; transformers would clip them to white")
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise UserError(f"has {kind} of 32 bits as pixels, which have no largest value; convert it to 8 or 16 bits")
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent and transparency == "white":
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    # Converting by way of RGBA gives the same colours, and leaves no transparent colour behind for a later conversion.
    return (image.convert("RGBA") if transparent else image).convert("RGB")


@cache
def _say_once(line: str) -> None:
    say(line)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
