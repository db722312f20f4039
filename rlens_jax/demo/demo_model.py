"""Files of the embedded model besides its weights: config.json, tokenizer and image processor.

The sizes are our decision: twelve layers, so that there is something to rank, and widths that train on two CPU cores. So are
the word-level vocabulary and the missing default system prompt. Special tokens, chat layout and image processor are those of
Qwen2-VL. transformers 5.23 loads the folder with `AutoTokenizer`, `AutoProcessor` and `AutoImageProcessor` (`backend="pil"`
needs no torch).
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split

from rlens_jax.data.pages import VOCABULARY

PAD = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
UNKNOWN = "<unk>"
_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = (PAD, "<|im_start|>", END_OF_TURN, *_VISION_TOKENS, UNKNOWN)
TOKENS: tuple[str, ...] = (*SPECIAL_TOKENS, "\n", *VOCABULARY)
"""All tokens in the order of their ids."""

PATCH_SIZE = 4
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
MIN_PIXELS = 4096
MAX_PIXELS = 16384

# As the template of Qwen2-VL, without its default system prompt and without videos.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role: ' ~ message['role']) -}}
{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif item['type'] == 'text' -%}
{{- item['text'] -}}
{%- else -%}
{{- raise_exception('only images and text are supported, not: ' ~ item['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def special_ids() -> dict[str, int]:
    """Id of each special token."""
    return {token: index for index, token in enumerate(SPECIAL_TOKENS)}


def embedded_config() -> dict[str, Any]:
    """Fields of config.json, in the layout that Hugging Face publishes for Qwen2-VL."""
    ids = special_ids()
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 8.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 2048,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "vocab_size": len(TOKENS),
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 1,
            "embed_dim": 64,
            "num_heads": 8,
            "mlp_ratio": 3,
            "in_chans": 3,
            "hidden_size": 128,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "spatial_patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        },
    }


def write_processor(folder: Path) -> None:
    """Write the tokenizer, chat template and image processor files to `folder`, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            # Not Qwen2Tokenizer: for that name transformers builds a byte-level BPE, not this word list.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": END_OF_TURN,
            "unk_token": UNKNOWN,
            "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (PAD, END_OF_TURN, UNKNOWN)],
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "processor_class": "Qwen2VLProcessor",
        },
    )
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "patch_size": PATCH_SIZE,
            "merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            # Names of the same two limits in transformers 5.
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
            "do_convert_rgb": True,
            "do_resize": True,
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=UNKNOWN))
    # A line break is a token of its own.
    tokenizer.pre_tokenizer = Sequence([Split(Regex(r"[^\S\n]+"), "removed"), Split("\n", "isolated")])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
