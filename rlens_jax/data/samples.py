"""`Sample`, the output of every data source."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

IMAGE_MARK = "<image>"
"""Marks the place of an image in the question of a marked sample."""
VIDEO_MARK = "<video>"
"""What other formats mark the place of a video with, which is not supported."""


@dataclass(frozen=True)
class Sample:
    """One question about one or more images.

    Attributes:
        id: unique in the run, such as "pages_read/validation/000012" or "my.jsonl:17".
        dataset: name of the dataset.
        images: encoded image files, as bytes or as paths.
        question: the user's text.
        answers: right answers, each as `normalised` returns it, in teacher forcing and comparisons with generated text; none
            in data without answers.
        marked: whether the first `IMAGE_MARK`s in the question are the places of the images. Otherwise the images come first and
            all of the question is text.
        as_stored: whether the images are read as VLMEvalKit reads those of its TSV files; see `images.load_images`.
        own: tokens of the dense model's own answer, which takes the place of `answers` in teacher forcing.
        system: the system prompt; None leaves it to the chat template.
        turns: earlier questions of the conversation, each with its answer. Images come first in the first of all questions, or
            at the marks of all of them.
    """

    id: str
    dataset: str
    images: tuple[bytes | Path, ...]
    question: str
    answers: tuple[str, ...]
    marked: bool = False
    as_stored: bool = False
    own: tuple[int, ...] | None = None
    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def conversation(self) -> str:
        """What the user says besides the question, as one text; empty for a single question without a system prompt."""
        return repr((self.system, self.turns)) if self.system is not None or self.turns else ""


def normalised(answer: str) -> str:
    """An answer without white space at its ends, in Unicode's composed form (NFC): equal for equal answers."""
    return unicodedata.normalize("NFC", answer.strip())
