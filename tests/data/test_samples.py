"""Opening images: right pixels, and one clear error for every bad file."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlens_jax.data.samples import load_image
from rlens_jax.errors import UserError

RAMP = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "png", **options)
    return file.getvalue()


def header_only(width: int, height: int) -> bytes:
    """A PNG that states a size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bytes_and_files_give_the_same_rgb(tmp_path: Path):
    data = png(Image.fromarray(RAMP))
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        image = load_image(source, "set:1")
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), RAMP)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str):
    file = io.BytesIO()
    Image.fromarray(RAMP).convert(mode).save(file, "tiff")
    image = load_image(file.getvalue(), "set:1")
    assert (image.mode, image.size) == ("RGB", (7, 5))


@pytest.mark.filterwarnings("error")
def test_transparent_palette_keeps_its_colours_quietly():
    indexed = Image.fromarray(RAMP).quantize(8)
    data = png(indexed, transparency=bytes([0, 128, 255]))
    assert np.array_equal(np.asarray(load_image(data, "set:1")), np.asarray(indexed.convert("RGB")))


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    assert load_image(png(Image.fromarray(RAMP), exif=exif), "set:1").size == (7, 5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [10_001, 15_000, 60_000])
def test_absurd_sizes_are_refused_from_the_header(side: int):
    with pytest.raises(UserError, match=rf"^set:1: image has {side} x {side} = {side**2} pixels, more than the 1000"):
        load_image(header_only(side, side), "set:1")


@pytest.mark.filterwarnings("error")
def test_the_limit_is_exact_and_replaces_that_of_pillow(monkeypatch: pytest.MonkeyPatch):
    data = png(Image.fromarray(RAMP))
    with monkeypatch.context() as patched:
        patched.setattr("rlens_jax.data.samples.MAX_IMAGE_PIXELS", 35)
        assert load_image(data, "set:1").size == (7, 5)
        patched.setattr("rlens_jax.data.samples.MAX_IMAGE_PIXELS", 34)
        with pytest.raises(UserError, match="35 pixels, more than the 34 allowed"):
            load_image(data, "set:1")
    # 95 million pixels: Pillow alone would warn; our error is about the missing pixels only.
    with pytest.raises(UserError, match="cannot be decoded"):
        load_image(header_only(9_500, 10_000), "set:1")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cannot be read"),
        (b"this is no image", "cannot be read"),
        (png(Image.fromarray(RAMP))[:50], "cannot be decoded"),
        (header_only(7, 5), "cannot be decoded"),
    ],
)
def test_unreadable_images_name_sample_and_file(tmp_path: Path, content: bytes, problem: str):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^set:7: image .*bad\.png {problem}") as caught:
        load_image(path, "set:7")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=rf"^set:7: image {problem}"):
        load_image(content, "set:7")


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.png does not exist$"):
        load_image(tmp_path / "gone.png", "set:7")
    with pytest.raises(UserError, match="cannot be read"):
        load_image(tmp_path, "set:7")
