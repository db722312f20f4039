"""Samples from a folder of images, which has no answers: each image with a few standing questions (our decision).

They serve objectives that compare with the dense model, which need no answers.
"""

from pathlib import Path

from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError

QUESTIONS = (
    "Describe this image in one sentence.",
    "What is the main object in this image? Answer with a single word or phrase.",
    "What text can be read in this image? Answer with the text.",
)
"""A description, a recognition and a reading: short answers, and one of a sentence."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
DATASET = "images"


def read_image_folder(folder: Path) -> list[Sample]:
    """All images of a folder in the order of their names, each with all questions; files of other names are left out.

    A sample is named by its file, as "cat.png/0" for the first question. Folders in the folder are not searched.

    Raises:
        UserError: the folder cannot be read or has no images.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error
    if not paths:
        raise UserError(f"{folder}: no images; a folder must have files that end in {', '.join(SUFFIXES)}")
    return [
        Sample(f"{path.name}/{number}", DATASET, (path,), question, ())
        for path in paths
        for number, question in enumerate(QUESTIONS)
    ]
