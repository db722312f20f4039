"""Chat prompts as token ids, written by the tokenizer and the chat template of a checkpoint."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlens_jax.data.samples import IMAGE_MARK, Sample
from rlens_jax.errors import UserError


def question_content(sample: Sample) -> list[dict[str, str]]:
    """Split a user turn into parts: images stand at the first marks of a marked sample, or before the text."""
    num_images = len(sample.images)
    parts = sample.question.split(IMAGE_MARK, num_images) if sample.marked else [""] * num_images + [sample.question]
    content: list[dict[str, str]] = []
    for number, text in enumerate(parts):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": text}] if text else []
    return content


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def turn(self, sample: Sample, content: str | list[dict[str, str]], answer: str | None) -> tuple[list[int], int]:
        """Token ids of a user turn, followed by `answer` and the end of the turn unless it is None.

        Returns:
            The token ids, and how many of them are the answer and the end of the turn.

        Raises:
            UserError: the tokenizer merges the first letters of the answer with the end of the prompt.
        """
        turn = {"role": "user", "content": content}
        text = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        prompt = self.ids(text)
        ids = prompt if answer is None else self.ids(text + answer + self.tokenizer.eos_token)
        if ids[: len(prompt)] != prompt:
            raise UserError(f"{sample.id}: the answer {answer!r} merges with the prompt's last token; change its first letters")
        return ids, len(ids) - len(prompt)

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`, unchanged."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def stop_token(self) -> int:
        """The token that ends a turn."""
        return int(self.tokenizer.eos_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


class PlaceholderChat(Chat):
    """A chat whose template writes one placeholder token per image; it is repeated, once per visual token of the image."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: int):
        super().__init__(tokenizer)
        self.image_token = image_token

    def encode(self, sample: Sample, tokens_per_image: Sequence[int], answer: str | None) -> tuple[np.ndarray, int]:
        """Token ids of a sample, followed by `answer` and the end of the turn unless it is None.

        Returns:
            The token ids, int32 [T], and how many of them are the answer and the end of the turn.

        Raises:
            UserError: the text contains the placeholder of the model, or the answer merges with the prompt.
        """
        ids, num_answer = self.turn(sample, question_content(sample), answer)
        if ids.count(self.image_token) != len(tokens_per_image):
            raise UserError(f"{sample.id}: the text contains the model's image placeholder; remove it")
        counts = iter(tokens_per_image)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (next(counts) if token == self.image_token else 1)
        return np.array(expanded, np.int32), num_answer
