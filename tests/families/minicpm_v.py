"""MiniCPM-V 2.6 in PyTorch, tiny and random, to compare with: transformers has no such class, and published code is not run.

Parts of transformers and torch are put together by the published names: Qwen2 as `llm`, SigLIP as `vpm`, and a resampler of
`torch.nn.MultiheadAttention`. Views are cut by transformers' processor of MiniCPM-V 4.6, which slices as 2.6 does but wants
sides of four patches, so a quarter of the patch size makes it the same.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.families.tiny_files import NUM_QUERIES, PATCH, RESOLUTION, byte_tokenizer, preprocessor_json
from tests.torch_support import redraw

WIDTH = 256
MARKS = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
SPECIAL = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 77,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 259,
}
VISION = {
    "hidden_size": 24,
    "image_size": 80,
    "intermediate_size": 41,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "patch_size": PATCH,
}


def config_json(**overrides) -> dict:
    """config.json in the published, flat form."""
    return {
        **TEXT,
        "model_type": "minicpmv",
        "version": 2.6,
        "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
        "architectures": ["MiniCPMV"],
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "drop_vision_last_layer": False,
        "slice_mode": True,
        "query_num": NUM_QUERIES,
        "vision_config": {**VISION, "model_type": "siglip"},
        **overrides,
    }


class Resampler(torch.nn.Module):
    """Cross-attention of learned queries to one view's patches [J, E] of a grid of rows and columns."""

    def __init__(self, num_queries: int, width: int, in_width: int):
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(num_queries, width))
        self.kv_proj = torch.nn.Linear(in_width, width, bias=False)
        self.attn = torch.nn.MultiheadAttention(width, width // 128)
        self.ln_q, self.ln_kv, self.ln_post = (torch.nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = torch.nn.Parameter(torch.zeros(width, width))

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        half = self.query.shape[1] // 2
        table = np.zeros((rows, columns, 2 * half), np.float32)
        for i in range(half // 2):
            rate = np.float32(1) / np.float32(10000) ** np.float32(i / (half / 2))
            for y in range(rows):
                table[y, :, half + i] = math.sin(np.float32(y) * rate)
                table[y, :, half + half // 2 + i] = math.cos(np.float32(y) * rate)
            for x in range(columns):
                table[:, x, i] = math.sin(np.float32(x) * rate)
                table[:, x, half // 2 + i] = math.cos(np.float32(x) * rate)
        return torch.from_numpy(table.reshape(rows * columns, -1))

    def forward(self, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        values = self.ln_kv(self.kv_proj(x))
        attended, _ = self.attn(self.ln_q(self.query), values + self.positions(rows, columns), values)
        return self.ln_post(attended) @ self.proj


class MiniCPMV(torch.nn.Module):
    """Float32, eager attention, every parameter redrawn; views one at a time, so nothing is ever padded."""

    def __init__(self, seed: int, **overrides):
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

        rope = {"rope_type": "default", "rope_theta": 10000.0}
        self.config = Qwen2Config(**TEXT | overrides, rope_parameters=rope, pad_token_id=257, attn_implementation="eager")
        vision = SiglipVisionConfig(**VISION, vision_use_head=False, attn_implementation="eager")
        self.llm = Qwen2ForCausalLM(self.config)
        self.vpm = SiglipVisionModel(vision)
        self.resampler = Resampler(NUM_QUERIES, self.config.hidden_size, vision.hidden_size)
        redraw(self, seed)
        with torch.no_grad():  # so that a query's bias, which softmax hides in part, can be seen in the logits
            self.resampler.attn.in_proj_bias[: self.config.hidden_size] *= 3
        self.eval()

    def save(self, folder: Path, **overrides) -> Path:
        """The model in the published names, with config.json; `overrides` are fields of it."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["llm.lm_head.weight"]
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config_json(**overrides)))
        return folder

    @torch.no_grad()
    def features(self, view: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """SigLIP of one view [3, h, w]: states [J, E] after the last norm, rows and columns of its patches."""
        embeddings = self.vpm.embeddings
        grid = embeddings.patch_embedding(view[None])[0]
        rows, columns = grid.shape[1:]
        ids = position_ids(rows, columns, VISION["image_size"] // PATCH)
        x = grid.flatten(1).T + embeddings.position_embedding(ids)
        return self.vpm.post_layernorm(self.vpm.encoder(x[None]).last_hidden_state)[0], rows, columns

    @torch.no_grad()
    def visual_tokens(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """All views of one image to [views * Q, D]."""
        return torch.cat([self.resampler(*self.features(view)) for view in views])

    @torch.no_grad()
    def embeddings(self, token_ids: np.ndarray, visual: Sequence[torch.Tensor]) -> torch.Tensor:
        """[T, D]: visual tokens of all images between the marks, as the published code finds them."""
        starts, ends = (
            [i for i, token in enumerate(token_ids) if int(token) in {id_of(mark) for mark in marks}]
            for marks in (("<image>", "<slice>"), ("</image>", "</slice>"))
        )
        x = self.llm.get_input_embeddings()(torch.tensor(token_ids.astype(np.int64))).clone()
        slots = [slot for a, b in zip(starts, ends, strict=True) for slot in range(a + 1, b)]
        if slots:
            x[torch.tensor(slots)] = torch.cat(list(visual))
        return x

    @torch.no_grad()
    def logits(self, token_ids: np.ndarray, visual: Sequence[torch.Tensor]) -> torch.Tensor:
        """[T, V] of one sample."""
        return self.llm(inputs_embeds=self.embeddings(token_ids, visual)[None]).logits[0]

    def generate(self, token_ids: np.ndarray, visual: Sequence[torch.Tensor], new_tokens: int) -> list[int]:
        """Greedy continuation of one sample."""
        x = self.embeddings(token_ids, visual)[None]
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        return self.llm.generate(
            inputs_embeds=x, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
        )[0].tolist()


class AsTransformers(torch.nn.Module):
    """The model in the form that `rlens_jax.torch_twin` reduces: it sees the ids of a sample, and has a `language_model`."""

    def __init__(self, model: MiniCPMV):
        super().__init__()
        self.language_model, self.config, self._logits = model.llm.model, model.config, model.logits

    def forward(self, input_ids: torch.Tensor, token_ids: np.ndarray, visual: Sequence[torch.Tensor]) -> torch.Tensor:
        """[T, V] of one sample; `input_ids` [1, T] only say which tokens are visual."""
        return self._logits(token_ids, visual)


def position_buckets(patches: int, side: int) -> torch.Tensor:
    """Places of `patches` patches in a row among `side` trained ones, by the published rule."""
    edges = torch.arange(1 / side, 1.0, 1 / side)
    # The published number of patches is a tensor, so its inverse is rounded to float32 before it is a step.
    fractions = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(patches, dtype=torch.int32))
    return torch.bucketize(fractions, edges, right=True)


def position_ids(rows: int, columns: int, side: int) -> torch.Tensor:
    return (position_buckets(rows, side)[:, None] * side + position_buckets(columns, side)).flatten()


def cut_views(image: Image.Image) -> tuple[list[torch.Tensor], tuple[int, int] | None]:
    """Normalised views [3, h, w] of an image, and columns and rows of its slices."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    fields = preprocessor_json()
    small = PATCH // 4
    processor = MiniCPMV4_6ImageProcessorPil(
        patch_size=small, scale_resolution=RESOLUTION, image_mean=fields["norm_mean"], image_std=fields["norm_std"]
    )
    result = processor(images=[image], return_tensors="pt")
    views, start = [], 0
    for rows, columns in result["target_sizes"].tolist():
        stop = start + rows * columns * small
        strip = result["pixel_values"][0, :, :, start:stop].reshape(3, small, rows, columns, small)
        views.append(strip.permute(0, 2, 1, 3, 4).reshape(3, rows * small, columns * small))
        start = stop
    rows, columns = result["grids"][0]
    return views, ((columns, rows) if rows else None)


def id_of(token: str) -> int:
    """A special token's id in the tiny tokenizer."""
    return 256 + SPECIAL.index(token)


def save_processing(folder: Path, **overrides) -> Path:
    """preprocessor_config.json and a tokenizer of bytes that, as published, asks for a class of its own.

    `overrides` are fields of preprocessor_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer(SPECIAL).save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "MiniCPMVTokenizerFast",
        "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
        "chat_template": CHAT_TEMPLATE,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(MARKS),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_json(**overrides)))
    for name in ("tokenization_minicpmv_fast", "image_processing_minicpmv", "modeling_minicpmv"):
        (folder / f"{name}.py").write_text("raise SystemExit('the code of a checkpoint was run')")
    return folder
