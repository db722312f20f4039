"""What a model folder says about text: its tokenizer, its chat template, and the tokens that end a turn."""

import sys
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlens_jax.errors import UserError, foreign
from rlens_jax.files import quoted, read_json_object, read_text
from rlens_jax.models.chat import PlaceholderChat
from rlens_jax.models.template_trial import try_template
from rlens_jax.resources import embedded_model

TOKENIZER_FILE = "tokenizer_config.json"

Loaded_co = TypeVar("Loaded_co", covariant=True)


@runtime_checkable
class Loader(Protocol[Loaded_co]):
    """A class of transformers that reads its objects from a folder."""

    def from_pretrained(self, folder: Path, *, local_files_only: bool) -> Loaded_co: ...


def read_chat(folder: Path, image_token: int, vocabulary: int) -> PlaceholderChat:
    """The chat of a folder whose template writes placeholders of images, all by files that transformers reads.

    Raises:
        UserError: as `load_tokenizer`, `read_template` and `read_stop_tokens`.
    """
    tokenizer = load_tokenizer(AutoTokenizer, folder)
    tokenizer.chat_template = read_template(folder, tokenizer)
    chat = PlaceholderChat(tokenizer, vocabulary, read_stop_tokens(folder, tokenizer, vocabulary), image_token)
    chat.opening, chat.lead = find_opening(tokenizer), find_lead(tokenizer)
    return chat


def find_opening(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The token that the tokenizer puts before every text, unless the chat template writes it: as transformers' processors do."""
    begin = tokenizer.bos_token
    if not begin or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return ()
    return () if _written(tokenizer, [_QUESTION]).startswith(begin) else (tokenizer.bos_token_id,)


def find_lead(tokenizer: PreTrainedTokenizerFast) -> str:
    """The white space that the chat template writes between the end of a prompt and an answer, which is part of the answer.

    Vicuna's prompts end with "ASSISTANT:", and its answers begin with a space. Other templates end a prompt with a newline or a
    token, and write nothing more.
    """
    prompt, answered = _written(tokenizer, [_QUESTION]), _written(tokenizer, [_QUESTION, _ANSWER])
    lead = answered.removeprefix(prompt).partition(_MARK)[0] if prompt and answered.startswith(prompt) else ""
    return lead if lead.isspace() else ""


_MARK = "RLENS"
_QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
_ANSWER = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}


def _written(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]]) -> str:
    """What the chat template writes, up to where the next answer begins; nothing if it refuses the turns."""
    asks = turns[-1]["role"] == "user"
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks))
    except Exception:  # of a template for other turns; where it is used, it raises its error
        return ""


def load_tokenizer(loader: Loader[Any], folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, as a class of transformers reads it.

    Raises:
        UserError: its files are missing or cannot be read, or are not those of a fast tokenizer.
    """
    if loader is AutoTokenizer or (folder / TOKENIZER_FILE).exists():  # which names the class of the tokenizer
        read_json_object(folder / TOKENIZER_FILE)
    with foreign(f"{folder}: no usable tokenizer", "; copy the files of the published model beside config.json"):
        # Without network and without code of the checkpoint.
        tokenizer = loader.from_pretrained(folder, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{folder}: the tokenizer has no tokenizer.json; copy that of the published model beside config.json")
    # transformers only warns of longer texts. The model's own limit is in config.json.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def read_template(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat template of a folder, from where transformers' processors take it, else that of the tokenizer.

    Raises:
        UserError: there is none, or it takes too much time or memory.
    """
    template, where = _find_template(folder, tokenizer)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str) or not template.strip():
        raise UserError(f"{where}: no chat template; copy chat_template.jinja of the published model beside config.json")
    if folder != embedded_model():  # the package's own needs no trial, which starts a process
        try_template(template, str(where))
    return template


def read_stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> tuple[int, ...]:
    """The tokens that end a turn: the tokenizer's, and those of generation_config.json or else of config.json.

    Raises:
        UserError: the tokenizer has no end-of-turn token, or a file has something else than numbers of tokens below `vocabulary`.
    """
    token = tokenizer.eos_token
    number = tokenizer.get_vocab().get(token) if token else None
    if number is None:
        raise UserError(f"{folder}: the tokenizer has no eos_token; copy {TOKENIZER_FILE} of the published model")
    if number >= vocabulary:
        raise UserError(
            f"{folder}: the tokenizer's eos_token {token!r} has number {number}, but the model's embedding has {vocabulary} "
            "rows; tokenizer and weights are of different models"
        )
    stop_tokens = [number]
    path = folder / "generation_config.json"
    if path.exists():
        stop_tokens += _token_numbers(read_json_object(path), str(path), vocabulary)
    if len(stop_tokens) == 1 and (path := folder / "config.json").exists():
        fields = read_json_object(path)
        nested = fields.get("text_config")
        stop_tokens += _token_numbers(fields, str(path), vocabulary)
        if len(stop_tokens) == 1 and isinstance(nested, dict):
            stop_tokens += _token_numbers(nested, f"{path}: text_config", vocabulary)
    return tuple(dict.fromkeys(stop_tokens))


def _token_numbers(fields: dict[str, Any], where: str, vocabulary: int) -> list[int]:
    """The field `eos_token_id`: a number, a list of them, or none."""
    value = fields.get("eos_token_id")
    if value is None:
        return []
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < vocabulary for n in numbers):
        wanted = f"the number of one of the model's {vocabulary} tokens, or a list of such numbers"
        raise UserError(f"{where}: eos_token_id must be {wanted}, not {quoted(value)}")
    return numbers


def _find_template(folder: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Path]:
    """The first template in transformers' order, which may be of any type, and the file or folder that has it."""
    for name in ("processor_config.json", "chat_template.json"):
        if (path := folder / name).exists() and (template := read_json_object(path).get("chat_template")) is not None:
            return template, path
    if (path := folder / "chat_template.jinja").exists():
        return read_text(path), path
    return tokenizer.chat_template, folder
