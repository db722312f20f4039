"""What a checkpoint says in generation_config.json of its answers, besides its end tokens (`chat_files.read_stop_tokens`).

Answers are greedy. The repetition penalty and the lengths also decide greedy answers, and are applied. Whatever else would change
an answer is named in `GenerationConfig.not_applied`: sampling, beams, and rules of transformers that few checkpoints use.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlens_jax.errors import UserError
from rlens_jax.files import quoted, read_json_object

GENERATION_FILE = "generation_config.json"
COLD = 1e-4
"""At most this temperature, samples are the best tokens, unless two logits differ by less than about a thousandth."""
NEUTRAL = 1.0
"""The repetition penalty that changes nothing."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_Check = tuple[Callable[[Any], bool], str]
_POSITIVE: _Check = (lambda value: _number(value) and 0 < value < float("inf"), "a positive number")
_WHOLE: _Check = (lambda value: _count(value) and value > 0, "a whole number from 1")
_SHARE: _Check = (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1")
_CHECKS: Mapping[str, _Check] = {
    "repetition_penalty": _POSITIVE,
    "max_new_tokens": _WHOLE,
    "max_length": _WHOLE,
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _number(value) and 0 <= value < float("inf"), "a number from 0"),
    "top_k": (_count, "a whole number from 0"),
    "top_p": _SHARE,
    "num_beams": _WHOLE,
}
_SAMPLING = ("temperature", "top_p", "top_k")
_WITHOUT_EFFECT: Mapping[str, Any] = {
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "watermarking_config": None,
    "stop_strings": None,
    "max_time": None,
}
"""Further rules of transformers that change greedy answers, each with the value, besides null, that changes nothing."""


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says of the decoding of its answers.

    Attributes:
        repetition_penalty: the factor of `models.generation.Penalty`.
        max_new_tokens: most tokens of an answer.
        max_length: most tokens of a prompt with its answer, where `max_new_tokens` is not given.
        not_applied: what else it asks for that would change answers, in words.
    """

    repetition_penalty: float = NEUTRAL
    max_new_tokens: int | None = None
    max_length: int | None = None
    not_applied: tuple[str, ...] = ()

    def decoding(self, default: int, max_new_tokens: int | None = None, repetition_penalty: float | None = None) -> "Decoding":
        """How to decode: as given, else as the checkpoint says, else with answers of at most `default` tokens.

        As in transformers, the checkpoint's `max_length` counts only where nothing gives a number of new tokens.

        Raises:
            UserError: a given value is out of range.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if repetition_penalty is not None and not _POSITIVE[0](repetition_penalty):
            raise UserError(f"repetition_penalty must be {_POSITIVE[1]}, not {repetition_penalty}")
        given = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        penalty = self.repetition_penalty if repetition_penalty is None else float(repetition_penalty)
        return Decoding(default, penalty, self.max_length) if given is None else Decoding(given, penalty)


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded, greedily.

    Attributes:
        max_new_tokens: most tokens of an answer.
        repetition_penalty: the factor of `models.generation.Penalty`; `NEUTRAL` applies none.
        max_length: most tokens of a prompt with its answer; None bounds the answer alone.
    """

    max_new_tokens: int
    repetition_penalty: float = NEUTRAL
    max_length: int | None = None

    def room(self, prompt: int) -> int:
        """Most tokens of the answer to a prompt of so many tokens; less than 1 if there is no room for one."""
        return self.max_new_tokens if self.max_length is None else min(self.max_new_tokens, self.max_length - prompt)


def read_generation_config(folder: Path) -> GenerationConfig:
    """The settings of a model folder, neutral where it has no such file.

    Raises:
        UserError: the file is not a JSON object, or a field has a value of a wrong type or out of range.
    """
    path = folder / GENERATION_FILE
    fields = read_json_object(path) if path.exists() else {}
    for name, (fits, wanted) in _CHECKS.items():
        if fields.get(name) is not None and not fits(fields[name]):
            raise UserError(f"{path}: {name} must be {wanted}, not {quoted(fields[name])}")
    penalty = fields.get("repetition_penalty")
    return GenerationConfig(
        NEUTRAL if penalty is None else float(penalty),
        fields.get("max_new_tokens"),
        fields.get("max_length"),
        (*_sampling(fields), *_beams(fields), *_rules(fields)),
    )


def _sampling(fields: Mapping[str, Any]) -> list[str]:
    temperature = fields.get("temperature")
    cold = temperature is not None and temperature <= COLD
    if not fields.get("do_sample") or fields.get("top_k") == 1 or cold:
        return []
    given = [f"{name} {fields[name]}" for name in _SAMPLING if fields.get(name) is not None]
    return [f"sampling ({', '.join(given)})" if given else "sampling"]


def _beams(fields: Mapping[str, Any]) -> list[str]:
    beams = fields.get("num_beams")
    return [f"a search of {beams} beams"] if beams is not None and beams > 1 else []


def _rules(fields: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {quoted(fields[name])}"
        for name, neutral in _WITHOUT_EFFECT.items()
        if fields.get(name) is not None and fields[name] != neutral
    ]
