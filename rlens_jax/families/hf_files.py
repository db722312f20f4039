"""Tokenizers and image processors of a model folder, read by transformers without network, torch or remote code."""

from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import sentencepiece_model_pb2_new

from rlens_jax.errors import UserError
from rlens_jax.families.hf_config import read_json

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""A space, as sentencepiece writes it."""
PROCESSOR_FILE = "preprocessor_config.json"

Loaded = TypeVar("Loaded")
Loaded_co = TypeVar("Loaded_co", covariant=True)


@runtime_checkable
class Loader(Protocol[Loaded_co]):
    """A class of transformers that reads its objects from a folder."""

    def from_pretrained(self, folder: Path, *, local_files_only: bool) -> Loaded_co: ...


def read_folder(loader: Loader[Loaded], folder: Path, content: str) -> Loaded:
    """Read an object of a transformers class from a model folder.

    Args:
        loader: the class.
        folder: the model folder.
        content: the file that is read, or what several files hold together, for error messages.

    Raises:
        UserError: the files are missing or cannot be read.
    """
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise errors of many types for broken files, some of them bare exceptions
        raise unusable(folder, content, error) from None


def unusable(folder: Path, content: str, error: Exception) -> UserError:
    """The one-line message for files that a library could not read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{folder}: no usable {content} ({reason}); copy the files of the published model beside config.json")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder whose tokenizer class may be remote code, from files that are data.

    Reads tokenizer.json, or Qwen2's vocab.json and merges.txt, or tokenizer.model.

    Raises:
        UserError: the folder holds none of these, or one that cannot be read.
    """
    names = {path.name for path in folder.glob("*")}
    if "tokenizer.json" in names:
        return read_folder(PreTrainedTokenizerFast, folder, "tokenizer")
    if {"vocab.json", "merges.txt"} <= names:
        return read_folder(Qwen2TokenizerFast, folder, "tokenizer")
    if {"tokenizer.model", "tokenizer_config.json"} <= names:
        try:
            return _read_sentencepiece(folder)
        except UserError:
            raise
        except Exception as error:  # of protobuf and tokenizers, of many types
            raise unusable(folder, "tokenizer", error) from None
    raise UserError(
        f"{folder}: no tokenizer; copy tokenizer.json, or vocab.json and merges.txt, or tokenizer.model and "
        "tokenizer_config.json beside config.json"
    )


def _read_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    """Read InternLM2's tokenizer: a sentencepiece BPE with some unused pieces renamed.

    The added tokens of tokenizer_config.json replace the pieces with their numbers, or follow the last piece.
    """
    proto = sentencepiece_model_pb2_new.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    normal = proto.normalizer_spec
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise UserError(f"{folder / 'tokenizer.model'}: only BPE models are supported")
    if normal.remove_extra_whitespaces or normal.precompiled_charsmap:
        raise UserError(f"{folder / 'tokenizer.model'}: normalises text, which is not supported")
    fields = read_json(folder / "tokenizer_config.json")
    added = {int(number): token for number, token in fields["added_tokens_decoder"].items()}
    pieces = [added[i]["content"] if i in added else piece.piece for i, piece in enumerate(proto.pieces)]
    ordinary = (proto.SentencePiece.NORMAL, proto.SentencePiece.USER_DEFINED)
    mergeable = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type in ordinary and i not in added}
    merges = generate_merges(mergeable, {piece: proto.pieces[i].score for piece, i in mergeable.items()})
    tokenizer = Tokenizer(
        BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            unk_token=fields["unk_token"],
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    prefix = normal.add_dummy_prefix
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if prefix else [])]
    )
    tokenizer.add_tokens(
        [AddedToken(token["content"], normalized=False, special=bool(token.get("special"))) for _, token in sorted(added.items())]
    )
    for number, token in added.items():
        if tokenizer.token_to_id(token["content"]) != number:
            raise UserError(f"{folder / 'tokenizer_config.json'}: added token {token['content']!r} cannot get number {number}")
    special = {name: fields[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
