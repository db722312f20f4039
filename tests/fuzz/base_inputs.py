"""Well-formed inputs of every kind, made once per session without PyTorch."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from safetensors.numpy import save_file

from rlens_jax.checkpoints.conversion import to_orbax
from rlens_jax.families.registry import read_kind
from rlens_jax.files import json_text
from rlens_jax.parity.bundle import new_bundle
from rlens_jax.parity.constants import constants_of
from rlens_jax.plans import Plan, Reduction
from rlens_jax.reporting.report_files import timing_fields
from rlens_jax.resources import embedded_model
from rlens_jax.search.journal import Journal, Record
from rlens_jax.search.ranking_file import ranking_fields
from tests.checkpoints import tiny
from tests.data.benchmarks.files import benchmark_rows, write_tsv
from tests.families.tiny_files import NUM_QUERIES, PATCH, byte_tokenizer, preprocessor_json
from tests.reporting.synthetic import synthetic_results

FINGERPRINT = {"model": "m", "seed": 0, "search": {"penalty": 2.0}}
TSV = "OCRBench"
SPECIAL = (
    *("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>"),
    *("</image_id>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
)
ID = {token: 256 + number for number, token in enumerate(SPECIAL)}
_TEXT = {
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 257,
    "eos_token_id": 259,
}
_TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_hidden_layers": 3, "layer_norm_eps": 1e-6}
_PATCHES = {"depth": 3, "hidden_size": 16, "intermediate_size": 22, "num_heads": 2, "in_channels": 3, "patch_size": 4}
PINPOINTS = [[26 * rows, 26 * columns] for rows in (1, 2) for columns in (1, 2)]
_PIXELS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class BaseInputs:
    """Files and folders of each kind."""

    preparable: dict[str, Path]
    """Model folders without weights, by family."""
    model: Path
    converted: Path
    bundle: Path
    run: Path
    """ranking.json and timing.json."""
    journal: Path
    data: Path
    """rows.jsonl with its images, and a TSV file."""
    plan: Path
    config: Path


def make_base_inputs(folder: Path) -> BaseInputs:
    """All base inputs, below `folder`."""
    preparable = {
        "qwen2_vl": _embedded(folder / "qwen2_vl"),
        "qwen2_5_vl": _embedded(folder / "qwen2_5_vl", _qwen2_5_vl()),
        "qwen3_vl": _embedded(folder / "qwen3_vl", _qwen3_vl()),
        "llava": _folder(folder / "llava", _llava("llama"), _clip_pixels("CLIPImageProcessor"), "<image>"),
        "llava_next": _folder(folder / "llava_next", _llava_next(), _llava_next_pixels(), "<image>"),
        "llava_onevision": _folder(folder / "llava_onevision", _llava_onevision(), _llava_onevision_pixels(), "<image>"),
        "minicpmv": _folder(folder / "minicpmv", _minicpm(), preprocessor_json(), "IMAGE"),
        "internvl": _folder(folder / "internvl", _internvl(), _internvl_pixels(), "<IMG_CONTEXT>\n"),
        "internvl_chat": _folder(folder / "internvl_chat", _native(), None, "IMAGE"),
    }
    model = _weights(folder / "model")
    converted = folder / "converted"
    to_orbax(model, converted, None, lambda num_bytes: None, name="tiny")
    return BaseInputs(
        preparable,
        model,
        converted,
        _bundle(folder / "bundle", model),
        _run(folder / "run"),
        _journal(folder / "journal"),
        _data(folder / "data"),
        _plan(folder / "plan.json"),
        _config(folder / "config.yaml"),
    )


def _embedded(folder: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """The embedded model's folder, with these fields of config.json."""
    shutil.copytree(embedded_model(), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jsonl", "README.md"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json_text({**config, **changes}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "do_sample": False}))
    nested = {
        "image_processor": json.loads((folder / "preprocessor_config.json").read_text()),
        "processor_class": "Qwen2VLProcessor",
    }
    (folder / "processor_config.json").write_text(json_text(nested))
    return folder


def _folder(folder: Path, config: dict[str, Any], pixels: dict[str, Any] | None, image: str) -> Path:
    """config.json, a tokenizer of bytes with a template, and the files of an image processor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json_text(config))
    byte_tokenizer(SPECIAL).save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": _TEMPLATE.replace("IMAGE", image),
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    if config["model_type"] == "llava_onevision":
        (folder / "chat_template.json").write_text(json_text({"chat_template": fields.pop("chat_template")}))
    if config["model_type"] == "internvl":
        (folder / "added_tokens.json").write_text(json_text(ID))
        (folder / "special_tokens_map.json").write_text(json_text({"eos_token": "<|im_end|>", "unk_token": "<unk>"}))
    (folder / "tokenizer_config.json").write_text(json_text(fields))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [259, 257]}))
    if pixels is not None:
        (folder / "preprocessor_config.json").write_text(json_text(pixels))
    return folder


def _qwen2_5_vl() -> dict[str, Any]:
    windows = {"window_size": 16, "fullatt_block_indexes": [1]}
    vision = _PATCHES | windows | {"hidden_act": "silu", "out_hidden_size": 128}
    return {"model_type": "qwen2_5_vl", "vision_config": vision}


def _qwen3_vl() -> dict[str, Any]:
    rope = {"mrope_interleaved": True, "mrope_section": [3, 2, 2], "rope_type": "default"}
    text = _TEXT | {"model_type": "qwen3_vl_text", "vocab_size": 54, "head_dim": 14, "rope_scaling": rope}
    deepstack = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    vision = _PATCHES | deepstack | {"hidden_act": "gelu_pytorch_tanh", "out_hidden_size": 60}
    return {"model_type": "qwen3_vl", "tie_word_embeddings": False, "text_config": text, "vision_config": vision}


def _llava(text: str) -> dict[str, Any]:
    clip = {"model_type": "clip_vision_model", "image_size": 26, "patch_size": 4, "hidden_act": "quick_gelu"}
    return {
        "model_type": "llava",
        "text_config": _TEXT | {"model_type": text},
        "vision_config": _TOWER | clip,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_token_index": ID["<image>"],
    }


def _clip_pixels(kind: str) -> dict[str, Any]:
    crop = {"size": {"shortest_edge": 26}, "crop_size": {"height": 26, "width": 26}, "do_center_crop": True}
    return _PIXELS | crop | {"image_processor_type": kind}


def _llava_next() -> dict[str, Any]:
    fields = _llava("mistral")
    fields["text_config"]["sliding_window"] = None
    return fields | {"model_type": "llava_next", "image_grid_pinpoints": PINPOINTS}


def _llava_next_pixels() -> dict[str, Any]:
    return _clip_pixels("LlavaNextImageProcessor") | {"image_grid_pinpoints": PINPOINTS, "do_pad": True}


def _llava_onevision() -> dict[str, Any]:
    return {
        "model_type": "llava_onevision",
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _TOWER
        | {"model_type": "siglip_vision_model", "image_size": 26, "patch_size": 4, "hidden_act": "gelu_pytorch_tanh"},
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_3",
        "image_token_index": ID["<image>"],
        "video_token_index": ID["<video>"],
        "tie_word_embeddings": False,
    }


def _llava_onevision_pixels() -> dict[str, Any]:
    return _PIXELS | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 26, "width": 26},
        "image_grid_pinpoints": PINPOINTS,
    }


def _minicpm() -> dict[str, Any]:
    text = _TEXT | {"hidden_size": 256, "num_attention_heads": 8}
    return text | {
        "model_type": "minicpmv",
        "version": 2.6,
        "drop_vision_last_layer": False,
        "slice_mode": True,
        "query_num": NUM_QUERIES,
        "vision_config": _TOWER | {"model_type": "siglip", "image_size": 80, "patch_size": PATCH},
    }


def _internvl() -> dict[str, Any]:
    vision = _TOWER | {"image_size": [16, 16], "patch_size": [2, 2], "attention_bias": True, "norm_type": "layer_norm"}
    return {
        "model_type": "internvl",
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": vision,
        "image_token_id": ID["<IMG_CONTEXT>"],
        "downsample_ratio": 0.5,
        "vision_feature_layer": -1,
    }


def _internvl_pixels() -> dict[str, Any]:
    size = {"height": 16, "width": 16}
    return _PIXELS | {"image_processor_type": "GotOcr2ImageProcessor", "size": size, "min_patches": 1, "max_patches": 6}


def _native() -> dict[str, Any]:
    vision = _TOWER | {"image_size": 16, "patch_size": 2, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}
    return {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 16,
        "llm_config": _TEXT | {"model_type": "qwen3", "head_dim": 14},
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "vision_config": vision | {"hidden_act": "gelu"},
    }


def _weights(folder: Path) -> Path:
    """A tiny Qwen2-VL in two files with an index."""
    folder.mkdir()
    fields = tiny.fields()
    (folder / "config.json").write_text(json_text(fields))
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=tensor.shape).astype(np.float32) for name, tensor in read_kind(fields, "").table().tensors.items()
    }
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    total = sum(array.nbytes for array in tensors.values())
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json_text({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def _bundle(folder: Path, model: Path) -> Path:
    """Text only, with states and kept units; nothing is computed with it."""
    kind = read_kind(json.loads((model / "config.json").read_text()), "")
    decoder, reduction = kind.config.decoder, Reduction(attention_range=5, active_fraction=0.3)
    plan, rng = Plan(attention=(0,), ffn=(1,)), np.random.default_rng(0)
    tensors = {
        "input_ids": np.arange(12).reshape(2, 6).astype(np.int64),
        "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2]),
        "logits": rng.normal(size=(2, 6, decoder.vocabulary)).astype(np.float32),
        "hidden_states.0": rng.normal(size=(2, 6, decoder.width)).astype(np.float32),
        "kept_units.1": np.tile(np.arange(reduction.kept_units(decoder.ffn_width)), (2, 1)),
    }
    framework = {"name": "pytorch", "version": "2"}
    constants = constants_of(kind.config)
    about = {"model": "tiny", "family": "qwen2_vl", "dtype": "float32"}
    with new_bundle(folder, **about, framework=framework, constants=constants) as writer:
        writer.add(plan, reduction, tensors)
    return folder


def _run(folder: Path) -> Path:
    folder.mkdir()
    results = synthetic_results(num_layers=4, samples=20)
    (folder / "ranking.json").write_text(json_text(ranking_fields(results)))
    (folder / "timing.json").write_text(json_text(timing_fields(results.timing)))
    return folder


JOURNAL = {
    ("search", Plan()): ([0, 2, 1], [1.0, 0.0, 1.0]),
    ("search", Plan(ffn=(3,))): ([4], [0.5]),
    ("validation", Plan((2, 3), (3,))): ([0, 1, 2], [0.0, 0.0, 1.0]),
}
"""Split and plan -> samples and outcomes."""


def _journal(folder: Path) -> Path:
    with Journal.open(folder, FINGERPRINT) as journal:
        for (split, plan), (samples, outcomes) in JOURNAL.items():
            journal.append(Record(split, plan, samples, outcomes, 1.5))
    return folder


def _data(folder: Path) -> Path:
    folder.mkdir()
    for number, mode in enumerate(("RGB", "RGBA", "L", "P")):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60 + number, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).convert(mode)
        picture.save(folder / f"{number}.png")
    rgb = picture.convert("RGB")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    rgb.save(folder / "4.jpg", exif=turned)
    rgb.save(folder / "5.webp", lossless=True)
    rgb.save(folder / "6.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.save(folder / "7.tiff", compression="tiff_lzw")
    rgb.save(folder / "8.bmp")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "9.png")
    rgb.save(folder / "a.ico")
    rgb.save(folder / "b.pdf")
    rows = [
        {"image": f"{number}.png", "question": f"What is in {number}?", "answer": "a cat", "dataset": "mine", "id": f"q{number}"}
        for number in range(3)
    ]
    rows.append(
        {"images": ["0.png", "4.jpg"], "question": "Is <image> in <image>?", "answers": ["no"], "dataset": "mine", "marks": True}
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tsv(folder / f"{TSV}.tsv", benchmark_rows(TSV, images=3))
    return folder


def _plan(path: Path) -> Path:
    fields = {
        "format": "rlens-plan/1",
        "num_layers": 28,
        "attention": [14, 15, 27],
        "ffn": [20, 21],
        "attention_range": 64,
        "active_fraction": 0.25,
        "probe_fraction": "0.1",
        "probe": "strided",
        "window": "ordinal",
        "pruning": {"method": "fastv", "layer": 2, "share": 0.5},
    }
    path.write_text(json_text(fields))
    return path


def _config(path: Path) -> Path:
    path.write_text(
        "seed: 3\nmodel: embedded\nreduction:\n  attention_range: 16\n  active_fraction: 0.2\n  probe: random\n"
        "search:\n  penalty: 2.0\n  operators: [attention, ffn]\ndata:\n  source: pages\n"
    )
    return path
