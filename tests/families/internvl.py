"""Tiny InternVL models of PyTorch, their weights and config.json in the native layout, prompts and tokenizer files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from rlens_jax.families.internvl.model import InternVLConfig, Native
from rlens_jax.families.internvl.preparer import cut_tiles
from rlens_jax.models.prompt import Prompt, PromptBatch, collate_alone
from tests.families.pair import text_inputs
from tests.sequences import bucket_for
from tests.torch_support import redraw

TILE, PATCH = 16, 2
NATIVE = Native(min_tiles=1, max_tiles=6, thumbnail=True, template="internvl2_5")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
IMAGE_TOKEN = 256 + SPECIAL.index("<IMG_CONTEXT>")
TEXT = {
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 270,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 257,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": [TILE, TILE],
    "patch_size": [PATCH, PATCH],
    "layer_norm_eps": 1e-4,
    "attention_bias": True,
}
QWEN3 = {"head_dim": 14}
"""What a Qwen3 has besides `TEXT`: its heads are wider than the states, 6 x 14 > 60."""
SIX_B = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "layer_norm_eps": 1e-6}
"""What differs in the vision tower of 6 billion parameters."""


def tiny_internvl(seed: int, text_model: str = "qwen2", vision: dict | None = None, **overrides) -> torch.nn.Module:
    """An InternVLForConditionalGeneration of distinct sizes: float32, eager attention, every parameter redrawn.

    Args:
        seed: of the parameters.
        text_model: qwen2, qwen3 or llama.
        vision: fields of the vision config.
        overrides: fields of the text config, or the top-level `tie_word_embeddings`.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    tied = overrides.pop("tie_word_embeddings", False)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = InternVLConfig(
        text_config=TEXT | rope | (QWEN3 if text_model == "qwen3" else {}) | overrides | {"model_type": text_model},
        vision_config=VISION | (vision or {}),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    config.text_config.tie_word_embeddings = tied
    model = InternVLForConditionalGeneration(config)
    redraw(model, seed)
    return model.eval()


def save_native(folder: Path, model: torch.nn.Module, **fields) -> Path:
    """Writes a model in the native layout; `fields` go over those of its config.json. A Llama is written as InternLM2."""
    text, vision = model.config.text_config, model.config.vision_config
    internlm2 = text.model_type == "llama"
    tensors: dict[str, torch.Tensor] = {}
    tower = model.model.vision_tower
    tensors["vision_model.embeddings.class_embedding"] = tower.embeddings.cls_token
    tensors["vision_model.embeddings.position_embedding"] = tower.embeddings.position_embeddings
    add_linear(tensors, "vision_model.embeddings.patch_embedding", tower.embeddings.patch_embeddings.projection)
    for i, layer in enumerate(tower.encoder.layer):
        at = f"vision_model.encoder.layers.{i}."
        parts = [getattr(layer.attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        tensors[at + "attn.qkv.weight"] = torch.cat([part.weight for part in parts])
        if vision.attention_bias:
            tensors[at + "attn.qkv.bias"] = torch.cat([part.bias for part in parts])
        if vision.use_qk_norm:
            tensors[at + "attn.q_norm.weight"] = layer.attention.q_norm.weight
            tensors[at + "attn.k_norm.weight"] = layer.attention.k_norm.weight
        for name, module in (
            ("attn.proj", layer.attention.projection_layer),
            ("mlp.fc1", layer.mlp.fc1),
            ("mlp.fc2", layer.mlp.fc2),
            ("norm1", layer.layernorm_before),
            ("norm2", layer.layernorm_after),
        ):
            add_linear(tensors, at + name, module)
        tensors[at + "ls1"], tensors[at + "ls2"] = layer.lambda_1, layer.lambda_2
    for name in ("layer_norm", "linear_1", "linear_2"):
        number = {"layer_norm": 0, "linear_1": 1, "linear_2": 3}[name]
        add_linear(tensors, f"mlp1.{number}", getattr(model.model.multi_modal_projector, name))
    language = {f"model.{name}": tensor for name, tensor in model.model.language_model.named_parameters()}
    language["lm_head.weight"] = model.lm_head.weight
    if internlm2:
        language = as_internlm2(language, text)
    tensors |= {f"language_model.{name}": tensor for name, tensor in language.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(native_fields(model) | fields))
    return folder


def add_linear(tensors: dict[str, torch.Tensor], name: str, module: torch.nn.Module) -> None:
    for part, parameter in module.named_parameters():
        tensors[f"{name}.{part}"] = parameter


def as_internlm2(llama: dict[str, torch.Tensor], text) -> dict[str, torch.Tensor]:
    """A Llama's tensors under InternLM2's names: the rows of wqkv are, per kv head, its queries, its key, its value."""
    kv, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    group = text.num_attention_heads // kv
    result = {
        "model.tok_embeddings.weight": llama["model.embed_tokens.weight"],
        "model.norm.weight": llama["model.norm.weight"],
        "output.weight": llama["lm_head.weight"],
    }
    for i in range(text.num_hidden_layers):
        at = f"model.layers.{i}."
        q, k, v = (llama[f"{at}self_attn.{x}_proj.weight"] for x in "qkv")
        rows = []
        for head in range(kv):
            rows.append(q[head * group * dim : (head + 1) * group * dim])
            rows.append(k[head * dim : (head + 1) * dim])
            rows.append(v[head * dim : (head + 1) * dim])
        result[at + "attention.wqkv.weight"] = torch.cat(rows)
        for ours, theirs in {
            "attention.wo": "self_attn.o_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj",
        }.items():
            result[f"{at}{ours}.weight"] = llama[f"{at}{theirs}.weight"]
    return result


def native_fields(model: torch.nn.Module) -> dict:
    """config.json as OpenGVLab writes it."""
    text, vision = model.config.text_config, model.config.vision_config
    internlm2 = text.model_type == "llama"
    return {
        "model_type": "internvl_chat",
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "llm_config": {
            **{name: getattr(text, name) for name in (*TEXT, *(QWEN3 if text.model_type == "qwen3" else ()))},
            "model_type": "internlm2" if internlm2 else text.model_type,
            "hidden_act": "silu",
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            **({"bias": False, "rope_scaling": {"factor": 2.0, "type": "dynamic"}} if internlm2 else {}),
        },
        "max_dynamic_patch": NATIVE.max_tiles,
        "min_dynamic_patch": NATIVE.min_tiles,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat" if internlm2 else "internvl2_5",
        "use_thumbnail": True,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": TILE,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": PATCH,
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
        },
    }


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Waves, an edge and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    pixels = np.zeros((height, width, 3))
    for channel in range(3):
        for frequency in (1, 3, 7):
            a, b, phase = rng.uniform(-frequency, frequency, 3)
            pixels[..., channel] += np.sin(2 * np.pi * (a * x + b * y + phase)) / frequency
        pixels[..., channel] += x > rng.uniform(0.2, 0.8)
    pixels += 0.3 * rng.standard_normal(pixels.shape)
    return Image.fromarray(np.clip(128 + 60 * pixels, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Example:
    """One sample: token ids [T], where images are, and each one's tiles [Y, 3, TILE, TILE]."""

    token_ids: np.ndarray
    is_visual: np.ndarray
    tiles: list[np.ndarray]


def make_example(seed: int, parts: Sequence[int | tuple[int, int]]) -> Example:
    """A sample of alternating parts: a number of random text tokens, or an image's width and height in pixels."""
    rng, ids, tiles = np.random.default_rng(seed), [], []
    for number, part in enumerate(parts):
        if isinstance(part, int):
            ids += rng.integers(0, 256, part).tolist()
        else:
            tiles.append(cut_tiles(picture(seed * 100 + number, *part), TILE, NATIVE))
            ids += [IMAGE_TOKEN] * (len(tiles[-1]) * (TILE // PATCH // 2) ** 2)
    token_ids = np.array(ids, np.int32)
    return Example(token_ids, token_ids == IMAGE_TOKEN, tiles)


def hf_inputs(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Keyword arguments of Hugging Face's model: a right-padded batch."""
    inputs = text_inputs(examples)
    tiles = [t for e in examples for t in e.tiles]
    return inputs | ({"pixel_values": torch.tensor(np.concatenate(tiles))} if tiles else {})


def patches_of(tiles: np.ndarray) -> np.ndarray:
    """[Y, 3, TILE, TILE] to patches [Y, J, C] row by row, each as channel, row, column."""
    side = TILE // PATCH
    blocks = tiles.reshape(len(tiles), 3, side, PATCH, side, PATCH)
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(len(tiles), side * side, -1)


def our_images(examples: Sequence[Example], config: InternVLConfig, spare: int = 0) -> tuple[jax.Array, jax.Array]:
    """The tower's input [I, Y, J, C], padding tiles holding huge values, and where its tokens go, int32 [B, P].

    The latter are indices into the flattened visual tokens; padding points at a real one.
    """
    flat = [patches_of(tiles) for example in examples for tiles in example.tiles]
    flat = flat or [np.zeros((1, config.vision.num_patches, config.vision.sizes["c"]), np.float32)]
    slots = max(map(len, flat)) + 1
    patches = np.full((len(flat), slots, *flat[0].shape[1:]), 1e3, np.float32)
    for row, tiles in zip(patches, flat, strict=True):
        row[: len(tiles)] = tiles
    per_tile = config.vision.tile_tokens
    source = np.zeros((len(examples), max(int(e.is_visual.sum()) for e in examples) + spare), np.int32)
    image = 0
    for row, example in zip(source, examples, strict=True):
        tokens = [np.zeros(0, np.int32)]
        for tiles in example.tiles:
            tokens.append(image * slots * per_tile + np.arange(len(tiles) * per_tile))
            image += 1
        tokens = np.concatenate(tokens)
        row[: len(tokens)] = tokens
    return jnp.asarray(patches), jnp.asarray(source)


def our_batch(examples: Sequence[Example], spare: tuple[int, int] = (0, 0)) -> PromptBatch:
    """The prompts as the decoder reads them."""
    prompts = [
        Prompt(e.token_ids, e.is_visual, np.arange(len(e.token_ids), dtype=np.int32)[None], len(e.token_ids), 0) for e in examples
    ]
    bucket = bucket_for([example.is_visual for example in examples], spare)
    return jax.tree.map(jnp.asarray, collate_alone(prompts, bucket, 1))


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then `SPECIAL`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


HF_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
"""As in the published checkpoints of transformers' layout."""


def save_tokenizer(folder: Path, chat_template: str | None = None, *, adds_start: bool = False) -> None:
    """tokenizer.json and tokenizer_config.json of `byte_tokenizer`, whose own end token ends documents.

    With `adds_start` it puts `<s>` before every text, as a Llama's does.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer, special = byte_tokenizer(), {"eos_token": "</s>"}
    if adds_start:
        tokenizer.add_special_tokens(["<s>"])
        start = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
        special["bos_token"] = "<s>"
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    saved.chat_template = chat_template
    saved.save_pretrained(folder)
