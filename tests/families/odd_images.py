"""Forty odd image files, and what transformers' image processors get when a person opens such a file with Pillow."""

import io

import numpy as np
from PIL import Image, ImageOps

from rlens_jax.data.samples import Sample

SIZES = ((60, 41), (33, 90), (28, 28), (100, 7), (5, 80), (64, 64), (31, 30))
FORMATS_OF = {
    "RGB": ("png", "jpeg", "webp", "bmp", "tiff", "gif"),
    "L": ("png", "jpeg", "tiff", "bmp"),
    "RGBA": ("png", "webp", "tiff"),
    "LA": ("png", "tiff"),
    "P": ("png", "gif", "bmp", "tiff"),
    "1": ("png", "tiff", "bmp"),
    "CMYK": ("jpeg", "tiff"),
    "YCbCr": ("tiff",),
}
KEYED = {"RGB": (200, 100, 50), "L": 124, "1": 255, "P": 1}
"""A transparent colour, or a transparent entry of a palette."""
SCALED = "grey, 16 bits"
"""The one difference from transformers, which clips these: they are scaled by 1/257, and the user is told."""


def odd_images(seed: int = 0) -> dict[str, bytes]:
    """The files by what is odd about them."""
    rng = np.random.default_rng(seed)
    files: dict[str, bytes] = {}

    def picture(mode: str) -> Image.Image:
        width, height = SIZES[len(files) % len(SIZES)]
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        pixels[: height // 2, :, :3] = KEYED["RGB"]
        rgba = Image.fromarray(pixels)
        if mode in ("RGBA", "LA"):
            return rgba.convert(mode)
        return rgba.convert("RGB").quantize(8) if mode == "P" else rgba.convert("RGB").convert(mode)

    def add(name: str, image: Image.Image, kind: str, **options: object) -> None:
        file = io.BytesIO()
        image.save(file, kind, **options)
        files[f"{name}, {image.width} x {image.height}, {kind}"] = file.getvalue()

    for mode, kinds in FORMATS_OF.items():
        for kind in kinds:
            add(mode, picture(mode), kind)
    for mode, key in KEYED.items():
        add(f"{mode} with a transparent colour", picture(mode), "png", transparency=key)
    add("P with a transparent colour", picture("P"), "gif", transparency=2)
    add("P with steps of transparency", picture("P"), "png", transparency=bytes([0, 90, 200, 255]))
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[274] = orientation
        kind = ("jpeg", "png", "webp")[orientation % 3]
        add(f"orientation {orientation}", picture("RGBA" if kind == "png" else "RGB"), kind, exif=exif)
    for kind in ("png", "tiff"):
        add(SCALED, Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16)), kind)
    assert len(files) == 40
    return files


def as_opened(data: bytes) -> Image.Image:
    """The image upright, in its own mode."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "I;16":
        return Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8))
    return upright


def sample_of(data: bytes) -> Sample:
    return Sample("odd", "d", (data,), "what", ("this",))
