"""Reading a published model folder: its config.json, strictly, and what transformers loads from it.

A field of config.json that asks for an unsupported computation is an error; fields that cannot change an inference result are
ignored. Published config.json files are flat. Those that transformers saved again nest the fields of the decoder under
`text_config` and have `rope_parameters`. Both forms are read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from rlens_jax.errors import UserError
from rlens_jax.models.decoder import DecoderConfig

PROCESSOR_FILE = "preprocessor_config.json"
_LONGEST = 2**31 - 1
"""Context of a model whose config.json has none."""

Loaded = TypeVar("Loaded")
Loaded_co = TypeVar("Loaded_co", covariant=True)


class ConfigReader:
    """Reads fields of one JSON object; error messages name file and field."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        self.fields = fields
        self.where = where

    def number(self, name: str, *aliases: str, default: float | None = None) -> float:
        """A positive number under `name` or one of its older spellings."""
        for spelling in (name, *aliases):
            value = self.fields.get(spelling)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                    raise UserError(f"{self.where}: {spelling} must be a positive number, not {value!r}")
                return value
        if default is None:
            raise UserError(f"{self.where}: the field {name} is missing")
        return default

    def size(self, name: str, *aliases: str, default: int | None = None) -> int:
        """A positive whole number under `name` or one of its older spellings."""
        value = self.number(name, *aliases, default=default)
        if value != int(value):
            raise UserError(f"{self.where}: {name} must be a whole number, not {value!r}")
        return int(value)

    def require(self, name: str, *allowed: object) -> None:
        """Check that a field has one of the supported values; the first of them is the default."""
        value = self.fields.get(name, allowed[0])
        if value not in allowed:
            supported = " or ".join(repr(v) for v in allowed)
            raise UserError(f"{self.where}: {name} = {value!r} is not supported (only {supported})")

    def section(self, name: str) -> "ConfigReader":
        """A nested object."""
        value = self.fields.get(name)
        if not isinstance(value, Mapping):
            raise UserError(f"{self.where}: {name} must be an object, not {value!r}")
        return ConfigReader(value, f"{self.where}: {name}")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is missing or is not one."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder holds config.json and *.safetensors") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return fields


@runtime_checkable
class Loader(Protocol[Loaded_co]):
    """A class of transformers that reads its objects from a folder."""

    def from_pretrained(self, folder: Path, *, local_files_only: bool) -> Loaded_co: ...


def read_folder(loader: Loader[Loaded], folder: Path, content: str) -> Loaded:
    """Read an object of a transformers class from a model folder, without network or remote code.

    Raises:
        UserError: the files are missing or cannot be read; `content` names the file or what several files hold together.
    """
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise errors of many types for broken files, some of them bare exceptions
        raise unusable(folder, content, error) from None


def unusable(folder: Path, content: str, error: Exception) -> UserError:
    """The one-line message for files that a library could not read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{folder}: no usable {content} ({reason}); copy the files of the published model beside config.json")


def read_qwen2_decoder(config: ConfigReader) -> DecoderConfig:
    """Read the sizes of a Qwen2 decoder (biases on q, k and v only, SwiGLU, RMSNorm) from flat or nested fields."""
    text = ConfigReader({**config.fields, **(config.fields.get("text_config") or {})}, config.where)
    tied = bool(config.fields.get("tie_word_embeddings", text.fields.get("tie_word_embeddings", False)))
    return read_decoder(text, ("default", "mrope"), default_theta=1e6, qkv_bias=True, tied_head=tied)


def read_decoder(
    text: ConfigReader, rope_types: tuple[str, ...], *, default_theta: float | None, qkv_bias: bool, tied_head: bool
) -> DecoderConfig:
    """Read the sizes of a decoder of the kind of Qwen2 and Llama (SwiGLU, RMSNorm, full attention).

    Args:
        text: the fields of the decoder.
        rope_types: kinds of RoPE scaling that change nothing, as the family uses the decoder.
        default_theta: the rotary base if the fields have none; None if they must have one.
        qkv_bias: whether q, k and v have biases; no other linear map has one.
        tied_head: read by the caller, because families store it in different places.

    Raises:
        UserError: a field is missing or asks for what is not supported.
    """
    text.require("hidden_act", "silu")
    text.require("use_sliding_window", False, None)
    for layer_type in set(text.fields.get("layer_types") or ()):
        if layer_type != "full_attention":
            raise UserError(f"{text.where}: layer_types contains {layer_type!r}; only full_attention is supported")
    width, heads = text.size("hidden_size"), text.size("num_attention_heads")
    head_dim = text.size("head_dim", default=width // heads)
    theta, sections = _rope(text, head_dim, rope_types, default_theta)
    return DecoderConfig(
        num_layers=text.size("num_hidden_layers"),
        width=width,
        num_heads=heads,
        num_kv_heads=text.size("num_key_value_heads", default=heads),
        head_dim=head_dim,
        ffn_width=text.size("intermediate_size"),
        vocabulary=text.size("vocab_size"),
        context=text.size("max_position_embeddings", default=_LONGEST),
        norm_eps=text.number("rms_norm_eps"),
        rope_theta=theta,
        rope_sections=sections,
        qkv_bias=qkv_bias,
        tied_head=tied_head,
    )


def rope_scaling(text: ConfigReader) -> Mapping[str, Any]:
    """The fields of RoPE scaling, under their old or their new name."""
    return text.fields.get("rope_parameters") or text.fields.get("rope_scaling") or {}


def _rope(
    text: ConfigReader, head_dim: int, types: tuple[str, ...], default_theta: float | None
) -> tuple[float, tuple[int, ...]]:
    """Rotary base and sections; a kind of scaling that is not in `types` changes the angles and is an error."""
    scaling = rope_scaling(text)
    rope = ConfigReader(scaling, f"{text.where}: rope_scaling")
    rope.require("type", *types)
    rope.require("rope_type", *types)
    rope.require("partial_rotary_factor", 1.0)
    rope.require("mrope_interleaved", False)
    holder = rope if scaling.get("rope_theta") is not None else text
    theta = holder.number("rope_theta", default=default_theta)
    sections = tuple(scaling.get("mrope_section") or (head_dim // 2,))
    if sum(sections) != head_dim // 2:
        raise UserError(f"{rope.where}: mrope_section {list(sections)} must sum to half the head dim, {head_dim // 2}")
    return theta, sections
