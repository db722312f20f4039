"""A tiny LLaVA-1.5 and a tiny LLaVA-NeXT of Hugging Face, and prompts with textured images in their form and in ours."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from rlens_jax.families.anyres import cut_patches
from rlens_jax.families.llava_next.model import LlavaNextConfig, image_rows
from rlens_jax.models.prompt import Grid as Size
from tests.families.llava_onevision import picture
from tests.families.pair import text_inputs
from tests.families.prefill import SPARE
from tests.torch_support import redraw, save_tiny

VIEW, PATCH, SIDE = 14, 4, 3
"""Pixels a side of a view, of a patch, and patches a side: two pixels of a view are cut off."""
PINPOINTS = [[VIEW * rows, VIEW * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
IMAGE_TOKEN, VOCABULARY = 310, 330
"""The last rows of the vocabulary are padding, as in the published models."""
TEXT = {
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 0.1,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": VIEW,
    "patch_size": PATCH,
    "layer_norm_eps": 0.02,
}
"""Constants of norms are large, so that a wrong one shows in the logits."""


def tiny_llava(seed: int, **text: Any) -> torch.nn.Module:
    """A LlavaForConditionalGeneration on a Llama without GQA: float32, eager attention, every parameter redrawn."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=TEXT | {"model_type": "llama"} | text,
        vision_config=VISION,
        image_token_index=IMAGE_TOKEN,
        attn_implementation="eager",
    )
    model = LlavaForConditionalGeneration(config)
    redraw(model, seed)
    return model.eval()


def tiny_llava_next(seed: int, **text: Any) -> torch.nn.Module:
    """A LlavaNextForConditionalGeneration on a Mistral with GQA: float32, eager attention, every parameter redrawn."""
    from transformers import LlavaNextConfig as Config
    from transformers import LlavaNextForConditionalGeneration

    config = Config(
        text_config=TEXT | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None} | text,
        vision_config=VISION,
        image_grid_pinpoints=PINPOINTS,
        image_token_index=IMAGE_TOKEN,
        attn_implementation="eager",
    )
    model = LlavaNextForConditionalGeneration(config)
    redraw(model, seed)
    return model.eval()


MAKE = {"llava": tiny_llava, "llava_next": tiny_llava_next}


def image_processor(family: str) -> Any:
    """The family's, of transformers."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    crop, pixels = {"height": VIEW, "width": VIEW}, {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.125]}
    if family == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": VIEW}, crop_size=crop, **pixels)
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": VIEW}, crop_size=crop, image_grid_pinpoints=PINPOINTS, do_pad=True, **pixels
    )


@dataclass(frozen=True)
class Example:
    """One sample: token ids [T], where images are, and for each one its size, pixels and our arrays."""

    token_ids: np.ndarray
    is_visual: np.ndarray
    sizes: list[Size] = field(default_factory=list)
    views: list[np.ndarray] = field(default_factory=list)
    """[3, VIEW, VIEW], or for LLaVA-NeXT [v, 3, VIEW, VIEW]: the base view and the tiles."""
    arrays: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """Patches [J, c], or for LLaVA-NeXT views [v, J, c] and rows [Z]."""


def make_example(config: Any, seed: int, parts: Sequence[int | Size]) -> Example:
    """A sample of alternating parts: a number of random text tokens, or an image's height and width in pixels."""
    rng, many_views = np.random.default_rng(seed), isinstance(config, LlavaNextConfig)
    sizes = [part for part in parts if not isinstance(part, int)]
    processor = image_processor("llava_next" if many_views else "llava")
    views, arrays, ids = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, 190, part).tolist()
            continue
        (pixels,) = processor(images=[picture(seed * 100 + len(views), part)], return_tensors="np")["pixel_values"]
        views.append(pixels.astype(np.float32))
        if many_views:
            arrays.append((cut_patches(views[-1], PATCH), image_rows(config, part)[0]))
        else:
            arrays.append((cut_patches(views[-1][None], PATCH)[0],))
        ids += [IMAGE_TOKEN] * (len(arrays[-1][1]) if many_views else SIDE**2)
    token_ids = np.array(ids, np.int32)
    return Example(token_ids, token_ids == IMAGE_TOKEN, sizes, views, arrays)


def hf_inputs(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Keyword arguments of Hugging Face's models: a right-padded batch."""
    inputs = text_inputs(examples)
    views = [views for example in examples for views in example.views]
    if views and views[0].ndim == 4:
        most = max(map(len, views))
        views = [np.pad(v, ((0, most - len(v)), (0, 0), (0, 0), (0, 0))) for v in views]
        inputs["image_sizes"] = torch.tensor([size for example in examples for size in example.sizes])
    if views:
        inputs["pixel_values"] = torch.tensor(np.stack(views))
    return inputs


def our_images(config: Any, examples: Sequence[Example]) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """All images as the vision module reads them, padded, and for each visual slot its index into their flattened tokens."""
    flat = [arrays for example in examples for arrays in example.arrays]
    if not isinstance(config, LlavaNextConfig):
        patches = [arrays[0] for arrays in flat] or [np.zeros((SIDE**2, 3 * PATCH**2), np.float32)]
        arrays, slots = (np.stack(patches),), SIDE**2
    else:
        flat = flat or [(np.zeros((1, SIDE**2, 3 * PATCH**2), np.float32), np.zeros(1, np.int32))]
        slots = 5 + max(len(rows) for _, rows in flat)
        # Views that are padding hold huge values.
        views = np.full((len(flat), 6, SIDE**2, 3 * PATCH**2), 1e3, np.float32)
        for place, (pixels, _) in zip(views, flat, strict=True):
            place[: len(pixels)] = pixels
        arrays = views, np.stack([np.pad(rows, (0, slots - len(rows))) for _, rows in flat])
    counts = iter([SIDE**2 if len(part) == 1 else len(part[1]) for part in flat])
    source = np.zeros((len(examples), max(int(e.is_visual.sum()) for e in examples) + SPARE[1]), np.int32)
    image = 0
    for row, example in enumerate(examples):
        tokens = [np.zeros(0, np.int32)]
        for _ in example.arrays:
            tokens.append(image * slots + np.arange(next(counts)))
            image += 1
        joined = np.concatenate(tokens)
        source[row, : len(joined)] = joined
    return tuple(map(jnp.asarray, arrays)), jnp.asarray(source)


TEMPLATES = {
    "vicuna": (
        "{% for turn in messages %}{{ turn.role.upper() + ': ' }}"
        "{% for part in turn.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for part in turn.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral": (
        "{% for turn in messages %}{{ '[INST] ' if turn.role == 'user' else ' ' }}"
        "{% for part in turn.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for part in turn.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
        "{{ ' [/INST]' if turn.role == 'user' else '</s> ' }}{% endfor %}"
    ),
    "llama3": (
        "{{ '<s>system\n\nHelp.' }}{% for turn in messages %}{{ turn.role + '\n\n' }}"
        "{% for part in turn.content %}{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n\n' }}{% endif %}"
    ),
}
"""Turns as the published templates write them; that of Llama 3 writes the first token itself."""
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")


def write_tokenizer(folder: Path, template: str) -> None:
    """Tokenizer and template in the published form: a sentencepiece BPE that falls back to bytes, and puts <s> first."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz:\n?.USERAITN[]/", "▁a", "▁p"]
    words = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {f"filler{number}": number for number in range(len(words), IMAGE_TOKEN)}
    assert len(vocabulary) == IMAGE_TOKEN
    tokenizer = Tokenizer(BPE(vocabulary, [("▁", "a"), ("▁", "p")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    fields = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES[template]}))


def save_llava(folder: Path, family: str, template: str, **text: Any) -> Path:
    """A whole folder of a tiny model."""
    save_tiny(folder, MAKE[family](4, **text))
    image_processor(family).save_pretrained(folder)
    write_tokenizer(folder, template)
    fields = {
        "processor_class": "LlavaProcessor" if family == "llava" else "LlavaNextProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(fields))
    return folder
