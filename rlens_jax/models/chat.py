"""Chat prompts as token ids, written by the tokenizer and the chat template of a checkpoint."""

from collections.abc import Callable, Sequence
from types import MappingProxyType

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlens_jax.data.samples import IMAGE_MARK, Sample
from rlens_jax.errors import UserError, foreign
from rlens_jax.models.literal_text import Hidden, LiteralText

Part = dict[str, str]
"""A part of a user turn, as templates read it: an image, or a text."""
Content = str | list[Part]
"""A whole user turn, as templates read it."""

NOTHING_HIDDEN: Hidden = MappingProxyType({})
_LONGEST_TEMPLATE = 1_000_000
"""Characters that a template may add to a turn: far more than any model reads."""


def user_contents(sample: Sample) -> list[list[Part]]:
    """The user's turns as parts: images stand at the first marks of a marked sample, or before the text of the first turn."""
    left, contents = len(sample.images), []
    for text in (*(asked for asked, _ in sample.turns), sample.question):
        pieces = text.split(IMAGE_MARK, left) if sample.marked else [""] * left + [text]
        left -= len(pieces) - 1
        content: list[Part] = []
        for number, piece in enumerate(pieces):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece}] if piece else []
        contents.append(content)
    return contents


class Chat:
    """A tokenizer with its chat template.

    Args:
        tokenizer: it has a template and an end-of-turn token.
        vocabulary: rows of the model's embedding.
        stop_tokens: the tokens that end a turn.
        reserved: strings of `ids` that stand for tokens, besides the tokenizer's added tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, stop_tokens: tuple[int, ...], reserved: tuple[str, ...] = ()
    ):
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.unembedded: frozenset[int] = frozenset()
        """Placeholders, which need no embedding."""
        self.opening: tuple[int, ...] = ()
        """Tokens before all others, which the tokenizer adds and not the template."""
        self.lead = ""
        """White space that the template writes between the end of a prompt and its answer."""
        self.stop_tokens = stop_tokens
        self._literal = LiteralText(tokenizer, reserved)

    def turn(
        self,
        sample: Sample,
        contents: Sequence[Sequence[Part]],
        answer: str | None,
        write: Callable[[list[Part]], Content] = list,
    ) -> tuple[list[int], int]:
        """Token ids of a conversation up to the last user turn, followed by `answer` and the end of the turn unless it is None.

        No text of the sample becomes a special token: it is tokenised as letters.

        Args:
            sample: its system prompt and earlier answers; named in error messages.
            contents: images and texts of each user turn, in order.
            answer: a reference answer.
            write: makes the content that the template expects.

        Returns:
            The token ids, and how many of them are the answer and the end of the turn.

        Raises:
            UserError: the template or the tokenizer fails, the template leaves out the system prompt or an earlier turn, a token
                is outside the embedding, or the tokenizer merges the first letters of the answer with the end of the prompt.
        """
        said = _messages(sample, contents)
        with foreign(f"{sample.id}: the prompt cannot be written"):
            given = [part["text"] for _, parts in said for part in parts if "text" in part]
            texts, hidden = self._literal.hide([answer or "", *given])
            following = iter(texts[1:])
            messages = [
                {"role": role, "content": write([{**p, "text": next(following)} if "text" in p else p for p in parts])}
                for role, parts in said
            ]
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            if len(messages) > 1 and not all(part.strip() in text for part in texts[1:]):
                raise UserError(f"{sample.id}: the chat template of this model leaves out the system prompt or an earlier turn")
            if len(text) > _LONGEST_TEMPLATE + sum(map(len, texts)):
                raise UserError(f"{sample.id}: the chat template makes a prompt of {len(text)} characters")
            prompt = self.ids(text, hidden)
            ids = prompt if answer is None else self.ids(text + self.lead + texts[0] + self.tokenizer.eos_token, hidden)
        if ids[: len(prompt)] != prompt:
            raise UserError(f"{sample.id}: the answer {answer!r} merges with the prompt's last token; change its first letters")
        self._check_embedded(sample, ids)
        return [*self.opening, *ids], len(ids) - len(prompt)

    def ids(self, text: str, hidden: Hidden = NOTHING_HIDDEN) -> list[int]:
        """Token ids of `text`, unchanged; what its characters in `hidden` stand for is tokenised as letters."""
        return self._literal.ids(text, hidden)

    def length(self, ids: Sequence[int]) -> int:
        """How many of the generated token ids belong to the turn: all up to the first that ends it."""
        return next((place + 1 for place, number in enumerate(ids) if number in self.stop_tokens), len(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated token ids up to the end of the turn, without special tokens."""
        turn = [number for number in ids[: self.length(ids)] if number not in self.stop_tokens]
        return str(self.tokenizer.decode(turn, skip_special_tokens=True))

    def _check_embedded(self, sample: Sample, ids: Sequence[int]) -> None:
        """Raise UserError if a token has no embedding but needs one."""
        for number in set(ids) - self.unembedded:
            if number >= self.vocabulary:
                token = self.tokenizer.convert_ids_to_tokens(number)
                raise UserError(
                    f"{sample.id}: the token {token!r} has number {number}, but the model's embedding has "
                    f"{self.vocabulary} rows; tokenizer and weights are of different models"
                )


def _messages(sample: Sample, contents: Sequence[Sequence[Part]]) -> list[tuple[str, Sequence[Part]]]:
    """The role and the parts of each message, with the system prompt and the earlier answers."""
    said: list[tuple[str, Sequence[Part]]] = []
    if sample.system is not None:
        said.append(("system", [{"type": "text", "text": sample.system}]))
    for (_, answered), content in zip(sample.turns, contents, strict=False):
        said += [("user", content), ("assistant", [{"type": "text", "text": answered}])]
    return [*said, ("user", contents[-1])]


class PlaceholderChat(Chat):
    """A chat whose template writes one placeholder token per image; it is repeated, once per visual token of the image.

    Args:
        image_token: the placeholder. The other arguments are those of `Chat`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocabulary: int,
        stop_tokens: tuple[int, ...],
        image_token: int,
        reserved: tuple[str, ...] = (),
    ):
        super().__init__(tokenizer, vocabulary, stop_tokens, reserved)
        self.image_token = image_token
        self.unembedded = frozenset([image_token])

    def encode(self, sample: Sample, tokens_per_image: Sequence[int], answer: str | None) -> tuple[np.ndarray, int]:
        """Token ids of a sample, followed by `answer` and the end of the turn unless it is None.

        Returns:
            The token ids, int32 [T], and how many of them are the answer and the end of the turn.

        Raises:
            UserError: as `turn`, or the template does not write one placeholder per image.
        """
        ids, num_answer = self.turn(sample, self.contents(sample), answer)
        if (written := ids.count(self.image_token)) != len(tokens_per_image):
            token = self.tokenizer.convert_ids_to_tokens(self.image_token)
            raise UserError(
                f"{sample.id}: the chat template writes the image placeholder {token!r} {written} times for "
                f"{len(tokens_per_image)} images; copy the chat template of the published model"
            )
        counts = iter(tokens_per_image)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (next(counts) if token == self.image_token else 1)
        return np.array(expanded, np.int32), num_answer

    def contents(self, sample: Sample) -> list[list[Part]]:
        """Images and texts of each user turn, in order."""
        return user_contents(sample)
