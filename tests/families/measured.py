"""Compares the rule that sizes images with the images that a preparer makes."""

from pathlib import Path

from PIL import Image

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.models.prompt import Preparer

SIZES = ((60, 41), (33, 90), (28, 28), (100, 7), (8, 80), (64, 64), (131, 130), (300, 180), (250, 240), (61, 150), (203, 90))


def check_measured(folder: Path, preparer: Preparer, **limits: int) -> None:
    """The rule agrees with every image that a preparer of these limits makes."""
    measure = read_model_kind(folder).measure(folder, limits)
    for size in SIZES:
        (image,) = preparer.images([Image.new("RGB", size)], "s")
        assert measure(*size) == (image.size, image.tokens), size
