"""From a question with images to token ids, through the checkpoint's own tokenizer and chat template.

Published templates put one placeholder token per image; each is expanded to as many as the image has visual tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from rlens_jax.data.samples import IMAGE_MARK, Sample
from rlens_jax.errors import UserError


def question_content(question: str, num_images: int) -> list[dict[str, str]]:
    """A user turn's parts: images stand where the marks are, or before the text when there is none."""
    parts = question.split(IMAGE_MARK)
    if len(parts) == 1:
        parts = [""] * num_images + parts
    content: list[dict[str, str]] = []
    for number, text in enumerate(parts):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": text}] if text else []
    return content


class Chat:
    """A tokenizer and its chat template: token ids of a turn, and the text of token ids."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def turn(self, sample: Sample, content: str | list[dict[str, str]], answer: str | None) -> tuple[list[int], int]:
        """Ids of a user turn, followed by `answer` and the end of the turn if given, and how many belong to the answer.

        Raises:
            UserError: the answer cannot be told from the prompt.
        """
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = self.ids(text)
        ids = prompt if answer is None else self.ids(text + answer + self.tokenizer.eos_token)
        if ids[: len(prompt)] != prompt:
            raise UserError(
                f"{sample.id}: the answer {answer!r} merges with the prompt's last token; change its first letters"
            )
        return ids, len(ids) - len(prompt)

    def ids(self, text: str) -> list[int]:
        """Of a text as it stands."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def stop_token(self) -> int:
        """The token that ends a turn."""
        return int(self.tokenizer.eos_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


class ChatTokenizer(Chat):
    """Tokenizer and chat template of a model folder; the template has one placeholder an image."""

    def __init__(self, folder: Path, image_token: int):
        try:
            super().__init__(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{folder}: no usable tokenizer ({reason}); copy the tokenizer files beside config.json"
            ) from None
        self.image_token = image_token

    def encode(self, sample: Sample, tokens_per_image: Sequence[int], answer: str | None) -> tuple[np.ndarray, int]:
        """Token ids int32 [T] of the prompt, followed by `answer` and the end of the turn if given, and their number.

        Raises:
            UserError: the text itself contains image placeholders, or the answer cannot be told from the prompt.
        """
        ids, num_answer = self.turn(sample, question_content(sample.question, len(sample.images)), answer)
        if ids.count(self.image_token) != len(tokens_per_image):
            raise UserError(f"{sample.id}: the text contains the model's image placeholder; remove it")
        counts = iter(tokens_per_image)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (next(counts) if token == self.image_token else 1)
        return np.array(expanded, np.int32), num_answer
