"""Opening images: right pixels, and one clear error for every bad file."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from rlens_jax.data.images import Transparency, check_image, doubled, enlarged, image_file, load_image, load_images
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError

RAMP = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
SEEN = Image.fromarray(RAMP)
ALPHA = Image.fromarray((np.arange(35, dtype=np.uint8) * 7).reshape(5, 7))


def load(source: bytes | Path, transparency: Transparency = "white", upright: bool = True) -> Image.Image:
    return load_image(source, "set:1: image", transparency, upright=upright)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def header_only(width: int, height: int) -> bytes:
    """A PNG that states a size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def with_alpha(mode: str) -> Image.Image:
    image = SEEN.convert(mode)
    image.putalpha(ALPHA)
    return image


INDEXED = SEEN.quantize(8)
TRANSPARENT = {
    "RGBA": encoded(with_alpha("RGB")),
    "LA": encoded(with_alpha("L")),
    "WebP": encoded(with_alpha("RGB"), "webp", lossless=True, exact=True),
    "TIFF": encoded(with_alpha("RGB"), "tiff"),
    "palette, one colour": encoded(INDEXED, transparency=3),
    "palette, steps": encoded(INDEXED, transparency=bytes([0, 128, 255])),
    "GIF": encoded(INDEXED, "gif", transparency=2),
    "colour key": encoded(SEEN, transparency=tuple(map(int, RAMP[1, 1]))),
    "grey key": encoded(SEEN.convert("L"), transparency=SEEN.convert("L").getpixel((1, 1))),
}


def test_bytes_and_files_give_the_same_rgb(tmp_path: Path):
    data = encoded(SEEN)
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        image = load(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), RAMP)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str):
    image = SEEN.convert(mode)
    for source in (encoded(image, "tiff"), *([encoded(image)] if mode != "CMYK" else [])):
        assert np.array_equal(np.asarray(load(source)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_becomes_white_or_is_dropped(name: str):
    opened = Image.open(io.BytesIO(TRANSPARENT[name])).convert("RGBA")
    colours, alpha = np.asarray(opened)[..., :3].astype(float), np.asarray(opened)[..., 3:] / 255
    assert (alpha < 1).any()
    composited = np.asarray(load(TRANSPARENT[name]), float)
    assert np.abs(composited - (colours * alpha + 255 * (1 - alpha))).max() <= 1
    dropped = load(TRANSPARENT[name], "dropped")
    assert np.array_equal(np.asarray(dropped), colours)
    # Nothing is left for a processor that looks for a transparent colour.
    assert "transparency" not in dropped.info


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff"])
def test_grey_with_16_bits_is_scaled(kind: str, capsys: pytest.CaptureFixture[str]):
    values = np.array([[0, 128, 129, 257, 65535, 32768, 65406]], np.uint16)
    image = Image.fromarray(values)
    if kind == "big-endian tiff":
        image = Image.frombytes("I;16B", image.size, values.astype(">u2").tobytes())
    pixels = np.asarray(load(encoded(image, kind.rsplit(maxsplit=1)[-1])))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 255, 128, 254]
    assert (pixels == pixels[..., :1]).all()
    assert capsys.readouterr().err.count("scaled to 8 bits") <= 1


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "integers"), (np.float32, "floats")])
def test_pixels_without_a_largest_value_are_refused(dtype: type, kind: str):
    data = encoded(Image.fromarray(np.ones((5, 7), dtype)), "tiff")
    with pytest.raises(UserError, match=f"^set:1: image has {kind} of 32 bits as pixels"):
        load(data)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_the_exif_orientation_is_applied(orientation: int, kind: str):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(SEEN, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(np.asarray(load(data)), np.asarray(expected))
    assert expected.size == ((5, 7) if orientation in range(5, 9) else (7, 5))
    if kind != "tiff":  # a TIFF's orientation is part of its format, and Pillow always applies it
        assert load(data, upright=False).size == (7, 5)


def test_damaged_exif_says_nothing():
    assert load(encoded(SEEN, "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")).size == (7, 5)


def test_a_sample_of_a_benchmark_is_read_as_stored():
    exif = Image.Exif()
    exif[274] = 6
    turned, transparent = encoded(SEEN, exif=exif), TRANSPARENT["RGBA"]
    own = Sample("s", "d", (turned, transparent), "?", ("a",))
    stored = Sample("s", "d", (turned, transparent), "?", ("a",), as_stored=True)
    for sample, transparency, size, read in (
        (own, "white", (5, 7), "white"),
        (own, "dropped", (5, 7), "dropped"),
        (stored, "white", (7, 5), "dropped"),
    ):
        first, second = load_images(sample, transparency)
        assert first.size == size
        assert second.tobytes() == load(transparent, read).tobytes()


def test_images_of_another_size(monkeypatch: pytest.MonkeyPatch):
    """Doubled, bilinear; or with a random larger width of the seed's, with about the same sides' ratio, below 1344² pixels."""
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 50, 3), np.uint8))
    file = encoded(image)
    twice = load(doubled(file, "a"))
    np.testing.assert_array_equal(np.asarray(twice), np.asarray(image.resize((100, 60), Image.Resampling.BILINEAR)))
    sizes = [load(enlarged(file, "a", str(seed))).size for seed in range(40)]
    widths = {width for width, _ in sizes}
    assert len(widths) > 30 and min(widths) >= 50 and 1000 < max(widths) <= int(50 * (1344**2 / 1500) ** 0.5)
    assert all(height == int(width / 50 * 30) for width, height in sizes)
    shown = load(enlarged(file, "a", "7"))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(image.resize(shown.size, Image.Resampling.BICUBIC)))
    large = Image.new("RGB", (1344, 1344))
    assert load(enlarged(encoded(large), "a", "7")).size == large.size
    monkeypatch.setattr("rlens_jax.data.images.MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(UserError, match="a has 100 x 60 pixels when enlarged, more than the 5000 allowed"):
        doubled(file, "a")


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_the_first_of_several_frames(kind: str):
    frames = [Image.new("RGB", (7, 5), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = load(data).getpixel((3, 3))
    assert (red > 200, blue < 50) == (True, True)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (encoded(SEEN, "eps"), "EPS"),
        (encoded(SEEN, "pdf"), "PDF"),
        (b"8BPS" + bytes(100), "PSD"),
        (encoded(SEEN, "ico"), "ICO"),
        (encoded(SEEN, "ppm"), "PPM"),
        (encoded(SEEN, "jpeg2000"), "JPEG2000"),
        (encoded(SEEN, "avif"), "AVIF"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    ],
)
def test_other_formats_are_refused_by_name(content: bytes, name: str):
    for check in (load, lambda content: check_image(content, "set:1: image")):
        with pytest.raises(UserError, match=f"^set:1: image is a file of the format {name}; convert it to one of PNG, JPEG"):
            check(content)


@pytest.mark.parametrize("side", [10_001, 15_000, 60_000])
def test_absurd_sizes_are_refused_from_the_header(side: int):
    with pytest.raises(UserError, match=rf"^set:1: image has {side} x {side} = {side**2} pixels, more than the 1000"):
        load(header_only(side, side))


def test_the_limit_is_exact_and_replaces_that_of_pillow(monkeypatch: pytest.MonkeyPatch):
    data = encoded(SEEN)
    with monkeypatch.context() as patched:
        patched.setattr("rlens_jax.data.images.MAX_IMAGE_PIXELS", 35)
        assert load(data).size == (7, 5)
        patched.setattr("rlens_jax.data.images.MAX_IMAGE_PIXELS", 34)
        with pytest.raises(UserError, match="35 pixels, more than the 34 allowed"):
            load(data)
    # 95 million pixels: Pillow alone would warn; our error is about the missing pixels only.
    with pytest.raises(UserError, match="cannot be decoded"):
        load(header_only(9_500, 10_000))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is an empty file"),
        (b"this is no image", "is not an image"),
        (encoded(SEEN)[:50], "cannot be decoded"),
        (encoded(SEEN)[:20], "is a damaged PNG file"),
        (header_only(7, 5), "cannot be decoded"),
        (header_only(0, 5), "is a damaged PNG|has no pixels"),
        (encoded(SEEN, "jpeg")[:-30], "is a damaged JPEG file: "),
    ],
)
def test_unreadable_images_name_sample_and_file(tmp_path: Path, content: bytes, problem: str):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^set:1: image .*bad\.png ({problem})") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=rf"^set:1: image ({problem})"):
        load(content)


def test_damage_is_refused_without_noise(capfd: pytest.CaptureFixture[str]):
    """libtiff prints to the process's stderr, and some damage it only prints about; Pillow warns of cut files."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    refused = 0
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"):
        whole = encoded(noise.convert("1") if compression == "group4" else noise, "tiff", compression=compression)
        assert load(whole).size == (60, 40)
        for place in range(20, len(whole), len(whole) // 7):
            changed = bytearray(whole)
            for step in range(20):
                changed[(place + step * 7) % len(whole)] ^= 0x55
            for content in (bytes(changed), whole[:place]):
                try:
                    load(content)
                except UserError:
                    refused += 1
    assert refused > 40
    assert capfd.readouterr() == ("", "")


def test_what_is_no_image_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "a.png").write_bytes(encoded(SEEN))
    assert image_file("a.png", tmp_path, "row 1") == tmp_path / "a.png"
    for name, problem in {
        "gone.png": "no such file: .*gone",
        "loop.png": "no such file: .*loop",
        "x" * 3000: r"no such file: .*x \.\.\. x",
        "a\0.png": "no such file",
        "\ud83d.png": "no such file",
        "pipe.png": "not a regular file: .*pipe",
        ".": "not a regular file",
        "/dev/zero": "not a regular file",
        "DATA:image/png;base64," + "iVBO" * 1_000_000: "is a data URL; write the image to a file",
        "iVBO" * 1_000_000: "no such file: .*; image data must be in a file",
        "file:///a.png": "is a URL",
    }.items():
        with pytest.raises(UserError, match=f"^row 1:? {problem}") as caught:
            image_file(name, tmp_path, "row 1")
        assert len(str(caught.value)) < 400
    for name in ("gone.png", "pipe.png", "loop.png", "."):
        with pytest.raises(UserError, match=r"^set:1: image .*: cannot read"):
            load(tmp_path / name)
