"""Text of a user that stays text: what looks like an added token of the tokenizer is not one.

A template is written by the checkpoint, and its `<|im_end|>` is a token. The same letters in a question are letters. So each
part of a user's text that the tokenizer would take for an added token is replaced by a character that occurs nowhere else. In
the written template, all added tokens are then the template's own, and the text between them is tokenised without added tokens.
A text without such parts is tokenised as always.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

Hidden = Mapping[str, str]
"""What each stand-in character stands for."""

_STAND_INS = range(0xF0000, 0xFFFFE)
"""Characters for private use."""


class LiteralText:
    """Hides added tokens in a user's texts, and tokenises texts with hidden parts.

    Args:
        tokenizer: the checkpoint's tokenizer.
        reserved: further strings that mean more than their letters to the caller.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, reserved: Iterable[str] = ()):
        self._tokenizer = tokenizer
        self._added = {int(number): str(token.content) for number, token in tokenizer.added_tokens_decoder.items()}
        # A few tokenizers have spaces and newlines as added tokens. They are what they are, in a template and in a question.
        contents = {content for content in (*self._added.values(), *reserved) if content and not content.isspace()}
        self._pattern = re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")
        self._plain: dict[str, Tokenizer] = {}
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.normalized and token.content.strip()]
        self._normalised = {self._normalizer.normalize_str(t.content): t.content for t in tokens} if self._normalizer else {}
        """Added tokens that the tokenizer looks for in normalised text, by their own normalised spelling."""

    def hide(self, texts: Sequence[str]) -> tuple[list[str], Hidden]:
        """The texts with a stand-in for each part that could become an added token, and what the stand-ins are for.

        Raises:
            ValueError: other letters of a text become an added token when the tokenizer normalises them.
        """
        found = sorted({match for text in texts for match in self._pattern.findall(text)})
        stand_ins = dict(zip(found, _unused("".join(texts)), strict=False))
        hidden = {stand_in: content for content, stand_in in stand_ins.items()}
        written = [self._pattern.sub(lambda match: stand_ins[match[0]], text) for text in texts]
        if self._normalised:
            normalised = "\0".join(map(self._normalizer.normalize_str, written))
            for spelling, content in self._normalised.items():
                if spelling in normalised:
                    raise ValueError(f"letters of the text become the token {content!r}; spell them differently")
        return written, hidden

    def ids(self, text: str, hidden: Hidden) -> list[int]:
        """Token ids of a text. Its hidden parts are tokenised as letters.

        Raises:
            ValueError: the tokenizer has no other tokens for the letters of an added token.
        """
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if not hidden:
            return list(encoding["input_ids"])
        pieces: list[str] = []
        tokens: list[int] = []
        end = 0
        for number, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            # The unknown token is an added one, but unknown characters do not spell it.
            if number in self._added and text[start:stop].strip() == self._added[number].strip():
                pieces.append(text[end:start])
                tokens.append(number)
                end = stop
        reveal = {ord(stand_in): content for stand_in, content in hidden.items()}
        revealed = [piece.translate(reveal) for piece in (*pieces, text[end:])]
        boundary = next(_unused("".join(revealed)))
        tokenizer = self._without_added_tokens(boundary)
        ids, template = tokenizer.encode(boundary.join(revealed), add_special_tokens=False).ids, iter(tokens)
        literal = [next(template) if number == tokenizer.token_to_id(boundary) else number for number in ids]
        for content in set(hidden.values()):
            numbers = [number for number, added in self._added.items() if added == content]
            if any(literal.count(number) != tokens.count(number) for number in numbers):
                raise ValueError(f"{content!r} in the text is always a token of the model; spell it differently")
        return literal

    def _without_added_tokens(self, boundary: str) -> Tokenizer:
        """The tokenizer with `boundary` as its only added token."""
        if boundary not in self._plain:
            fields = json.loads(self._tokenizer.backend_tokenizer.to_str())
            plain = Tokenizer.from_str(json.dumps(fields | {"added_tokens": [], "truncation": None, "padding": None}))
            plain.add_special_tokens([AddedToken(boundary, normalized=False, special=True)])
            self._plain[boundary] = plain
        return self._plain[boundary]


def _unused(text: str) -> Iterator[str]:
    """Characters that are not in `text`."""
    return (chr(code) for code in _STAND_INS if chr(code) not in text)
