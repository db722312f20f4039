"""Images and prompts of an InternVL checkpoint: a grid of tiles, and a thumbnail of the whole image if there are several.

The tokens of all tiles of an image are one run in the prompt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL.Image import Image, Resampling
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import sentencepiece_model_pb2_new

from rlens_jax.data.benchmarks.catalogue import SHORT_ANSWER, Instance, Turn, choice_by_letter, is_choice
from rlens_jax.data.images import Transparency
from rlens_jax.data.samples import IMAGE_MARK, Sample
from rlens_jax.errors import UserError, foreign
from rlens_jax.families.chat_files import load_tokenizer, read_stop_tokens, read_template
from rlens_jax.families.image_files import MOST_TILES, make_processor, read_processor_fields
from rlens_jax.families.internvl.model import InternVLConfig, Native
from rlens_jax.files import read_json_object
from rlens_jax.models.chat import NOTHING_HIDDEN, Part, PlaceholderChat
from rlens_jax.models.literal_text import Hidden
from rlens_jax.models.prompt import ImageArrays, ImageSize, ImageTokens, Measure, PreparedImage, Prompt

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

IMAGE_TOKEN, IMAGE_START, IMAGE_END, TURN_END = "<IMG_CONTEXT>", "<img>", "</img>", "<|im_end|>"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""A space, as sentencepiece writes it."""
SYSTEM_2 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
SYSTEM_2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
CONVERSATIONS = {
    "Hermes-2": (SYSTEM_2, TURN_END),
    "internlm2-chat": (SYSTEM_2, TURN_END),
    "internvl2_5": (SYSTEM_2_5, TURN_END + "\n"),
}
"""System prompt and end of a turn, by `template` (source: conversation.py of OpenGVLab/InternVL)."""


def closest_grid(width: int, height: int, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Choose columns and rows of tiles by aspect ratio, as OpenGVLab's code does; sizes are in pixels.

    Of grids that are equally close, a later one wins if the image has more than half as many pixels as its tiles. The thumbnail
    does not count as a tile.
    """
    grids = {
        (columns, rows)
        for n in range(min_tiles, max_tiles + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    # Grids of equal area stay in the order of the set, as in the published code.
    best, smallest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        large = width * height > 0.5 * tile * tile * columns * rows
        if distance < smallest or (distance == smallest and large):
            best, smallest = (columns, rows), distance
    return best


def cut_tiles(image: Image, tile: int, native: Native) -> np.ndarray:
    """Cut an RGB image into normalised tiles, float32 [v, 3, tile, tile]: row by row, the thumbnail last.

    Source: `dynamic_preprocess` and `build_transform` of OpenGVLab/InternVL.
    """
    columns, rows = closest_grid(*image.size, tile, native.min_tiles, native.max_tiles)
    whole = image.resize((columns * tile, rows * tile), Resampling.BICUBIC)
    pixels = rearrange(np.asarray(whole), "(r y) (c x) z -> (r c) z y x", r=rows, c=columns)
    if native.thumbnail and len(pixels) > 1:
        thumbnail = np.asarray(image.resize((tile, tile), Resampling.BICUBIC)).transpose(2, 0, 1)
        pixels = np.concatenate([pixels, thumbnail[None]])
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]


class InternVLChat(PlaceholderChat):
    """A chat with the template of the checkpoint or, in the native layout, with the template of OpenGVLab's code.

    The native template is the one of `InternVLChatModel.chat` (conversation.py). The template in tokenizer_config.json
    belongs to the text model.
    """

    def __init__(self, folder: Path, config: InternVLConfig):
        tokenizer = read_tokenizer(folder)
        vocabulary = tokenizer.get_vocab()
        for token in (IMAGE_TOKEN, IMAGE_START, IMAGE_END, TURN_END):
            if token not in vocabulary:
                raise UserError(f"{folder}: the tokenizer has no token {token}, so it is not that of an InternVL")
        image_token = vocabulary[IMAGE_TOKEN]
        if config.image_token not in (None, image_token):
            raise UserError(
                f"{folder}: config.json says image_token_id {config.image_token}, but the tokenizer's {IMAGE_TOKEN} "
                f"is {image_token}"
            )
        # The end token of the text model ends a document, not a turn.
        tokenizer.eos_token = TURN_END
        if config.native is not None:
            start = "<s>" if config.text_model == "internlm2" else ""
            tokenizer.chat_template = _native_template(config.native.template, start)
        else:
            tokenizer.chat_template = read_template(folder, tokenizer)
        stop_tokens = read_stop_tokens(folder, tokenizer, config.decoder.vocabulary)
        super().__init__(tokenizer, config.decoder.vocabulary, stop_tokens, image_token, reserved=(IMAGE_MARK,))
        self.images_end_lines = config.native is not None
        self.start: list[int] = list(tokenizer("")["input_ids"])
        """What the tokenizer adds before a text."""

    def contents(self, sample: Sample) -> list[list[Part]]:
        """See `PlaceholderChat.contents`; in the native layout, an image before the text has a line of its own."""
        contents = super().contents(sample)
        if not self.images_end_lines or sample.marked:
            return contents
        line_end: Part = {"type": "text", "text": "\n"}
        return [
            [own for part in parts for own in ([part, line_end] if part["type"] == "image" else [part])] for parts in contents
        ]

    def ids(self, text: str, hidden: Hidden = NOTHING_HIDDEN) -> list[int]:
        """Token ids of `text`, with the tokenizer's start token before a text that does not begin with it.

        Each image is enclosed in `<img>` and `</img>`.
        """
        # Older templates of transformers contain <image>.
        text = text.replace(IMAGE_MARK, IMAGE_TOKEN)
        text = text.replace(IMAGE_TOKEN, IMAGE_START + IMAGE_TOKEN + IMAGE_END)
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        return [*([] if begins else self.start), *super().ids(text, hidden)]


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder whose tokenizer class may be remote code, from files that are data.

    Reads tokenizer.json, or Qwen2's vocab.json and merges.txt, or tokenizer.model; UserError if it can read none of these.
    """
    names = {path.name for path in folder.glob("*")}
    if "tokenizer.json" in names:
        return load_tokenizer(PreTrainedTokenizerFast, folder)
    if {"vocab.json", "merges.txt"} <= names:
        return load_tokenizer(Qwen2TokenizerFast, folder)
    if {"tokenizer.model", "tokenizer_config.json"} <= names:
        with foreign(f"{folder}: no usable tokenizer", "; copy the files of the published model beside config.json"):
            return _read_sentencepiece(folder)
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
    fields = read_json_object(folder / "tokenizer_config.json")
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


def _native_template(name: str, start: str) -> str:
    """A `Conversation` of OpenGVLab's conversation.py as a Jinja template; `ids` adds the brackets around images."""
    system, end = CONVERSATIONS[name]
    part = f"{{{{ '{IMAGE_TOKEN}' if part['type'] == 'image' else part['text'] }}}}"
    return (
        f"{start}{{% if messages[0]['role'] != 'system' %}}<|im_start|>system\n{system}{end}{{% endif %}}"
        "{% for message in messages %}"
        f"<|im_start|>{{{{ message['role'] }}}}\n{{% for part in message['content'] %}}{part}{{% endfor %}}{end}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def image_sizes(config: InternVLConfig, patches: int) -> list[ImageSize]:
    """See `Family.image_sizes`: whole tiles. With 1024 patches per tile, 12 tiles and a thumbnail need 13312 patches."""
    tiles = patches // config.vision.num_patches
    return [(tiles, config.vision.num_patches)] if tiles else []


def image_arrays(config: InternVLConfig, size: ImageSize) -> ImageArrays:
    """See `Family.image_arrays`."""
    return [((*size, config.vision.sizes["c"]), jnp.float32)]


def measure(config: InternVLConfig, fields: Mapping[str, Any]) -> Measure:
    """See `Family.measure`. `min_patches` and `max_patches` of `fields` replace the numbers of tiles in a native config.json.

    Of an image alone, for which `total_tiles` is no limit.
    """
    vision, native = config.vision, config.native or Native(1, 12, True, "")
    least, most = fields.get("min_patches", native.min_tiles), fields.get("max_patches", native.max_tiles)
    most = fields.get("max_tiles", most)

    def measured(width: int, height: int) -> tuple[ImageSize, ImageTokens]:
        tiles = math.prod(closest_grid(width, height, vision.image_size, least, most))
        tiles += native.thumbnail and tiles > 1
        return (tiles, vision.num_patches), ImageTokens(tiles * vision.tile_tokens)

    return measured


def cut_patches(tiles: np.ndarray, side: int) -> np.ndarray:
    """Tiles [v, 3, h, w] as patches of `side` pixels per side, [v, J, c]: row by row, each as channel, row, column."""
    return rearrange(tiles, "v c (r y) (q x) -> v (r q) (c y x)", y=side, x=side)


class InternVLPreparer:
    """See `Preparer`.

    Of `limits`, max_tiles takes the place of the checkpoint's. With total_tiles, the images of a prompt share so many tiles
    equally; each has at least one.
    """

    def __init__(self, folder: Path, config: InternVLConfig, limits: Mapping[str, int] = MappingProxyType({})):
        vision, native = config.vision, config.native
        if native is not None and native.max_tiles > MOST_TILES:
            raise UserError(f"{folder / 'config.json'}: max_dynamic_patch {native.max_tiles} is more than {MOST_TILES}")
        self.config = config
        self.transparency: Transparency = "white" if native is None else "dropped"
        self.chat = InternVLChat(folder, config)
        own = _hf_cutter(folder, vision.image_size) if native is None else _native_cutter(native, vision.image_size)
        self._cut, least, most = own
        self._most, self._total = limits.get("max_tiles", most), limits.get("total_tiles")
        if not least <= self._most <= MOST_TILES:
            raise UserError(f"max_tiles must be from {least}, the checkpoint's least, to {MOST_TILES}, not {self._most}")

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[PreparedImage]:
        """Each image as the patches of its tiles, [v, J, c]."""
        most = self._most if self._total is None else max(1, min(self._most, self._total // max(1, len(pixels))))
        return [self._image(image, most, sample_id) for image in pixels]

    def _image(self, pixels: Image, most: int, sample_id: str) -> PreparedImage:
        vision = self.config.vision
        with foreign(f"{sample_id}: an image of {pixels.width} x {pixels.height} pixels cannot be prepared"):
            patches = cut_patches(self._cut(pixels, most), vision.patch_size)
        return PreparedImage((patches,), ImageTokens(len(patches) * vision.tile_tokens))

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        """See `Preparer.prompt`."""
        ids, answer_length = self.chat.encode(sample, [image.count for image in images], answer)
        limit = self.config.max_tokens
        if limit is not None and len(ids) > limit:
            raise UserError(f"{sample.id}: {len(ids)} tokens; with dynamic RoPE scaling at most {limit} are supported")
        return Prompt.plain(ids, ids == self.chat.image_token, answer_length)


Cutter = tuple[Callable[[Image, int], np.ndarray], int, int]
"""Cuts an image into at most so many tiles; the checkpoint's own least and most tiles."""


def _native_cutter(native: Native, tile: int) -> Cutter:
    def cut(image: Image, most: int) -> np.ndarray:
        return cut_tiles(image, tile, replace(native, min_tiles=min(native.min_tiles, most), max_tiles=most))

    return cut, native.min_tiles, native.max_tiles


def _hf_cutter(folder: Path, tile: int) -> Cutter:
    """Cuts an image into tiles by preprocessor_config.json, with the image processor of transformers that needs no torch."""
    # Imported here: where torchvision is installed this import loads it, and a model without images needs neither.
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    fields, where = read_processor_fields(folder)
    processor = make_processor(GotOcr2ImageProcessorPil, fields, where)
    if (processor.size["height"], processor.size["width"]) != (tile, tile):
        raise UserError(f"{where}: size {dict(processor.size)} is not supported, the position embedding is for {tile} x {tile}")

    least, most = processor.min_patches, processor.max_patches

    def cut(image: Image, most: int) -> np.ndarray:
        # InternVLProcessor of transformers always crops, whatever the file says.
        bounds = {"min_patches": min(least, most), "max_patches": most}
        features = processor(images=[image], crop_to_patches=True, **bounds, return_tensors="np")
        return np.asarray(features["pixel_values"], np.float32)

    return cut, least, most


def benchmark_prompt(instance: Instance, config: InternVLConfig, step_by_step: bool) -> Turn:
    """The prompts of VLMEvalKit's vlm/internvl/internvl_chat.py and utils.py."""
    question = instance.question
    if is_choice(instance):
        text = choice_by_letter(instance)
    elif instance.dataset == "HallusionBench":
        text = f"{question} Please answer yes or no. {SHORT_ANSWER}"
    elif instance.dataset == "MME":
        text = f"{question} {SHORT_ANSWER}"
    elif instance.dataset == "POPE":
        text = question
    else:
        text = f"{question}\n{SHORT_ANSWER}"
    if len(instance.images) < 2:
        return Turn(text)
    # The native template ends no line after an image; the template of transformers does.
    line_end = "" if config.native is None else "\n"
    names = (f"Image-{number}: {IMAGE_MARK}{line_end}" for number in range(1, len(instance.images) + 1))
    return Turn("".join((*names, text)), marked=True)
