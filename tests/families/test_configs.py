"""config.json of all families: defaults, precedence and versions as transformers has them, and one line for a broken one."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields as dataclass_fields
from typing import Any

import pytest

from rlens_jax.errors import UserError
from rlens_jax.families.clip import CLIP
from rlens_jax.families.decoder_fields import LLAMA, MISTRAL, QWEN2
from rlens_jax.families.internvl.model import HF_VISION
from rlens_jax.families.qwen2_5_vl import model as qwen2_5_vl
from rlens_jax.families.qwen2_vl import model as qwen2_vl
from rlens_jax.families.registry import read_kind
from rlens_jax.families.siglip import SIGLIP
from rlens_jax.flops import PUBLISHED_DECODERS, DecoderSizes
from tests.families import published
from tests.families.published import BY_MODEL_TYPE

TEXT = {
    "qwen3_vl": "text_config",
    "internvl_chat": "llm_config",
    **dict.fromkeys(("internvl", "llava", "llava_next", "llava_onevision"), "text_config"),
}
"""Where the decoder's fields are; elsewhere they are not nested."""
THETA, PARAMETERS = {"rope_theta": 7.0, "rope_type": "default"}, {"rope_theta": 5.0, "rope_type": "default"}
NESTED = {
    **{name: value for name, value in BY_MODEL_TYPE["qwen2_vl"].items() if name not in ("vision_config", "model_type")},
    "model_type": "qwen2_vl_text",
}


def changed(fields: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with one field, after dots in nested objects, set."""
    copy: dict[str, Any] = deepcopy(dict(fields))
    *outer, last = path.split(".")
    place = copy
    for name in outer:
        place = place[name]
    place[last] = value
    return copy


def text_changed(model_type: str, **changes: object) -> dict[str, Any]:
    """A published config with changed fields of its decoder; `...` removes one."""
    copy: dict[str, Any] = deepcopy(BY_MODEL_TYPE[model_type])
    text = copy[TEXT[model_type]] if model_type in TEXT else copy
    text.update(changes)
    for name in [name for name, value in changes.items() if value is ...]:
        del text[name]
    return copy


def decoder(fields: Mapping[str, Any]):
    return read_kind(fields, "config.json").config.decoder


def refusal(fields: Mapping[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        read_kind(fields, "config.json")
    message = str(error.value)
    assert message.startswith("config.json: ")
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_defaults_are_those_of_the_classes_of_transformers() -> None:
    from transformers import (
        CLIPVisionConfig,
        InternVLVisionConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2_5_VLTextConfig,
        Qwen2Config,
        Qwen2VLTextConfig,
        SiglipVisionConfig,
    )
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    classes = {
        Qwen2Config: QWEN2,
        LlamaConfig: LLAMA,
        MistralConfig: MISTRAL,
        CLIPVisionConfig: CLIP,
        Qwen2VLTextConfig: qwen2_vl.TEXT,
        Qwen2VLVisionConfig: qwen2_vl.VISION,
        Qwen2_5_VLTextConfig: qwen2_vl.TEXT,
        Qwen2_5_VLVisionConfig: qwen2_5_vl.VISION,
        SiglipVisionConfig: SIGLIP,
        InternVLVisionConfig: HF_VISION | {"image_size": (448, 448), "patch_size": (14, 14)},
    }
    for config_class, ours in classes.items():
        made = config_class()
        theirs = {name: getattr(made, name) for name in ours if name != "rope_theta"}
        if "rope_theta" in ours:
            theirs["rope_theta"] = made.rope_parameters["rope_theta"]
        assert theirs == ours, config_class


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_sparse_sections_of_llava_are_what_transformers_fills_in(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    published = BY_MODEL_TYPE[model_type]
    filled = CONFIG_MAPPING[model_type](**deepcopy(published))
    for fields in (filled.to_dict(), filled.to_diff_dict()):
        assert read_kind(fields, "config.json").config == read_kind(published, "config.json").config
    assert "num_hidden_layers" not in published["text_config"]


def test_a_sliding_window_limits_the_context_and_null_is_none() -> None:
    """MistralConfig has a window of 4096 unless the file says null."""
    assert decoder(BY_MODEL_TYPE["llava_next"]).context == 32768
    assert decoder(text_changed("llava_next", sliding_window=...)).context == 4096
    assert decoder(text_changed("llava_next", sliding_window=99999)).context == 32768
    assert "sliding_window must be a positive number, not 0" in refusal(text_changed("llava_next", sliding_window=0))


@pytest.mark.parametrize("model_type", BY_MODEL_TYPE)
@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_theta": 3.0, "rope_scaling": THETA, "rope_parameters": PARAMETERS}, 7),
        ({"rope_theta": 3.0, "rope_scaling": None, "rope_parameters": PARAMETERS}, 5),
        ({"rope_theta": 3.0, "rope_scaling": {}, "rope_parameters": PARAMETERS}, 5),
        ({"rope_theta": 3.0, "rope_scaling": {"type": "default"}, "rope_parameters": PARAMETERS}, 3),
        ({"rope_theta": ..., "rope_scaling": {"type": "default"}}, None),
    ],
)
def test_rope_scaling_counts_before_rope_parameters_and_both_before_a_theta_beside_them(model_type, fields, theta) -> None:
    """The order of transformers 5.24; without any theta, the class's."""
    theta = theta or (5e5 if model_type == "qwen3_vl" else 1e6 if model_type.startswith("qwen2_") else 1e4)
    assert decoder(text_changed(model_type, **fields)).rope_theta == theta


def test_rope_type_counts_before_type() -> None:
    scaling = {"mrope_section": [16, 24, 24], "type": "linear", "rope_type": "default"}
    assert decoder(text_changed("qwen2_vl", rope_scaling=scaling)).rope_sections == (16, 24, 24)
    assert "rope_type = 'linear'" in refusal(text_changed("qwen2_vl", rope_scaling={"type": "linear"}))
    assert "rope_type = 'yarn'" in refusal(text_changed("minicpmv", rope_scaling={"type": "default", "rope_type": "yarn"}))


def test_fields_beside_text_config_are_ignored() -> None:
    fields = {**BY_MODEL_TYPE["qwen2_vl"], "rope_theta": 3.0, "hidden_size": 1, "text_config": NESTED}
    assert decoder(fields) == decoder(BY_MODEL_TYPE["qwen2_vl"])
    flat = decoder(BY_MODEL_TYPE["qwen2_vl"] | {"text_config": None})
    assert flat == decoder(BY_MODEL_TYPE["qwen2_vl"])
    inner = {name: value for name, value in NESTED.items() if name not in ("rope_theta", "rms_norm_eps")}
    assert (decoder(fields | {"text_config": inner}).rope_theta, decoder(fields | {"text_config": inner}).norm_eps) == (1e6, 1e-5)


def test_other_spellings_count_first_as_in_transformers() -> None:
    fields = BY_MODEL_TYPE["llava_onevision"] | {"image_token_id": 5}
    assert read_kind(fields, "config.json").config.image_token == 5
    kind = read_kind(changed(BY_MODEL_TYPE["qwen2_vl"], "vision_config.num_hidden_layers", 5), "config.json")
    assert kind.config.vision.depth == 5


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("qwen2_vl", ""),
        ("llava_onevision", ""),
        ("llava_onevision", "text_config."),
        ("llava", ""),
        ("llava_next", "text_config."),
        ("internvl", ""),
        ("internvl", "text_config."),
    ],
)
def test_either_flag_ties(model_type, path) -> None:
    fields = changed(BY_MODEL_TYPE[model_type], "tie_word_embeddings", False)
    assert not decoder(fields).tied_head
    assert decoder(changed(fields, f"{path}tie_word_embeddings", True)).tied_head
    assert "must be true or false, not 'false'" in refusal(changed(fields, f"{path}tie_word_embeddings", "false"))


RESAVED = {
    # vision_config without what equals a default; the flat fields complete
    "qwen2_vl 4.45 and 4.49": BY_MODEL_TYPE["qwen2_vl"]
    | {"vision_config": {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14}}
    | {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}},
    # all fields twice
    "qwen2_vl 4.57": BY_MODEL_TYPE["qwen2_vl"]
    | {"text_config": NESTED | {"layer_types": ["full_attention"] * 28, "sliding_window": None}},
    "qwen2_vl 5.24": {
        "model_type": "qwen2_vl",
        "text_config": {name: value for name, value in NESTED.items() if name not in ("rope_theta", "rope_scaling")}
        | {"rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default", "type": "mrope"}},
        "tie_word_embeddings": False,
        "vision_config": qwen2_vl.VISION
        | {"model_type": "qwen2_vl_vision", "hidden_size": 3584, "rope_parameters": {"rope_theta": 1e4, "rope_type": "axial"}},
    },
    "qwen2_5_vl 4.57": BY_MODEL_TYPE["qwen2_5_vl"]
    | {"text_config": NESTED | {"model_type": "qwen2_5_vl_text", "max_position_embeddings": 128000, "sliding_window": None}},
    "qwen2_5_vl 5.24": {
        "model_type": "qwen2_5_vl",
        "text_config": {name: value for name, value in NESTED.items() if name not in ("rope_theta", "rope_scaling")}
        | {"model_type": "qwen2_5_vl_text", "max_position_embeddings": 128000, "layer_types": ["full_attention"] * 28}
        | {"rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default", "type": "default"}},
        "tie_word_embeddings": False,
        "vision_config": {name: value for name, value in qwen2_5_vl.VISION.items() if name != "rope_theta"}
        | {"model_type": "qwen2_5_vl_vision", "hidden_size": 1280, "tokens_per_second": 2}
        | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "axial"}},
    },
    # nested sections without what equals a default
    "llava_onevision 4.45 and 4.49": text_changed("llava_onevision", max_position_embeddings=...),
    "llava_onevision 4.57": text_changed(
        "llava_onevision", rope_scaling=None, sliding_window=None, use_sliding_window=False, layer_types=["full_attention"] * 28
    ),
    "llava_onevision 5.24": text_changed(
        "llava_onevision", rope_theta=..., rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
    ),
    "internvl 4.57": changed(BY_MODEL_TYPE["internvl"], "text_config.layer_types", ["full_attention"] * 24),
    "internvl 5.24": text_changed(
        "internvl", rope_theta=..., rope_scaling=..., rope_parameters={"rope_theta": 1e6, "rope_type": "dynamic", "factor": 2.0}
    ),
}
"""config.json of the published models as these versions of transformers write it again."""


@pytest.mark.parametrize("style", RESAVED)
def test_a_config_saved_again_is_the_same_model(style: str) -> None:
    published = read_kind(BY_MODEL_TYPE[style.split(maxsplit=1)[0]], "config.json").config
    assert read_kind(RESAVED[style], "config.json").config == published


@pytest.mark.parametrize(
    ("model_type", "path", "value", "expected"),
    [
        ("qwen2_vl", "rms_norm_eps", float("nan"), "rms_norm_eps must be a positive number, not nan"),
        ("qwen2_vl", "rms_norm_eps", None, "rms_norm_eps must be a positive number, not None"),
        ("qwen2_vl", "rms_norm_eps", 2.0, "rms_norm_eps must be at most 1, not 2.0"),
        ("qwen2_vl", "rope_theta", float("inf"), "rope_theta must be at most 1e+12, not inf"),
        ("qwen2_vl", "hidden_size", 1e300, "hidden_size must be at most 1.04858e+06, not 1e+300"),
        ("qwen2_vl", "hidden_size", 10**40, "hidden_size must be at most 1.04858e+06, not 1000"),
        ("qwen2_vl", "num_hidden_layers", 10**6, "num_hidden_layers must be at most 1024"),
        ("qwen2_vl", "num_hidden_layers", True, "num_hidden_layers must be a positive number, not True"),
        ("qwen2_vl", "num_hidden_layers", 1.5, "num_hidden_layers must be a whole number, not 1.5"),
        ("qwen2_vl", "num_attention_heads", 0, "num_attention_heads must be a positive number, not 0"),
        ("qwen2_vl", "num_attention_heads", 5000, "hidden_size 3584 is smaller than num_attention_heads 5000"),
        ("qwen2_vl", "num_attention_heads", 27, "num_attention_heads 27 is no multiple of num_key_value_heads 4"),
        ("qwen2_vl", "head_dim", 64, "mrope_section must be 3 sizes that sum to half the head dim, 32"),
        ("qwen2_vl", "rope_scaling", ["mrope"], "rope_scaling must be an object, not ['mrope']"),
        ("qwen2_vl", "rope_scaling", {"full_attention": {}}, "full_attention is an object; RoPE by type of layer"),
        ("qwen2_vl", "rope_scaling", {"mrope_section": [8, 8]}, "mrope_section must be 3 sizes"),
        ("qwen2_vl", "layer_types", [["x"]], "layer_types must be 28 times 'full_attention', not [['x']]"),
        ("qwen2_vl", "text_config", [1], "text_config must be an object, not [1]"),
        ("qwen2_vl", "image_token_id", 152064, "image_token_id must be a token id, from 0 to 152063, not 152064"),
        ("qwen2_vl", "vision_config", "x" * 9999, "vision_config must be an object, not 'xxx"),
        ("qwen2_vl", "vision_config.embed_dim", 1288, "embed_dim 1288 is no multiple of 4 x num_heads, 16"),
        ("qwen2_vl", "vision_config.mlp_ratio", 1e-300, "mlp_ratio must give the MLP a unit, not 1e-300"),
        ("qwen2_vl", "vision_config.hidden_size", 1536, "hidden_size = 1536 is not supported (only 3584)"),
        ("qwen2_vl", "vision_config.rope_parameters", {"rope_theta": 5e3}, "rope_theta = 5000.0 is not supported (only 10000.0)"),
        ("qwen2_5_vl", "vision_config.out_hidden_size", 2048, "out_hidden_size = 2048 is not supported (only 3584)"),
        ("qwen2_5_vl", "vision_config.window_size", 27, "window_size must hold 2 x 2 patches, not 27"),
        ("qwen2_5_vl", "vision_config.fullatt_block_indexes", [7, -1], "must be a list of numbers of layers, not [7, -1]"),
        ("qwen2_5_vl", "vision_config.fullatt_block_indexes", [7, 32], "must be a list of numbers of layers, not [7, 32]"),
        ("qwen2_5_vl", "vision_config.fullatt_block_indexes", 7, "must be a list of numbers of layers, not 7"),
        ("qwen2_5_vl", "vision_config.hidden_act", "quick_gelu", "hidden_act = 'quick_gelu' is not supported (only 'silu')"),
        ("qwen2_5_vl", "use_sliding_window", True, "use_sliding_window = True is not supported"),
        ("llava_onevision", "text_config.model_type", ["qwen2"], "model_type = ['qwen2'] is not supported"),
        ("llava_onevision", "text_config.rope_scaling", {"type": "mrope"}, "rope_type = 'mrope' is not supported"),
        ("llava_onevision", "vision_config.image_size", 7, "image_size 7 is smaller than patch_size 14"),
        ("llava_onevision", "vision_config.num_attention_heads", 5, "hidden_size 1152 is no multiple of num_attention_heads 5"),
        ("llava_onevision", "vision_aspect_ratio", "anyres_max_99999", "is supported only as 'anyres_max_N', N below 10000"),
        ("llava_onevision", "image_grid_pinpoints", [[True, 384]], "image_grid_pinpoints contains [True, 384]"),
        ("llava_onevision", "image_grid_pinpoints", [[384, 384 * 10**9]], "image_grid_pinpoints contains [384, 384000000000]"),
        ("llava", "vision_feature_layer", -1, "vision_feature_layer = -1 is not supported (only -2)"),
        ("llava", "vision_feature_select_strategy", "full", "vision_feature_select_strategy = 'full' is not supported"),
        ("llava", "projector_hidden_act", "relu", "projector_hidden_act = 'relu' is not supported (only 'gelu')"),
        ("llava", "text_config.model_type", "qwen2", "model_type = 'qwen2' is not supported (only 'llama' or 'mistral')"),
        ("llava", "text_config.attention_bias", True, "attention_bias = True is not supported"),
        ("llava", "vision_config.model_type", "siglip_vision_model", "'siglip_vision_model' is not supported"),
        ("llava", "vision_config.hidden_act", "gelu", "hidden_act = 'gelu' is not supported (only 'quick_gelu')"),
        ("llava", "vision_config.num_hidden_layers", 1, "num_hidden_layers 1 leaves no block before the last"),
        ("llava", "vision_config.image_size", 7, "image_size 7 is smaller than patch_size 14"),
        ("llava", "image_token_index", 32064, "image_token_index must be a token id, from 0 to 32063, not 32064"),
        ("llava_next", "image_grid_pinpoints", [[336, 600]], "image_grid_pinpoints contains [336, 600]; only [height, width]"),
        ("llava_next", "use_image_newline_parameter", False, "use_image_newline_parameter = False is not supported"),
        ("minicpmv", "version", [2.6], "version = [2.6] is not supported"),
        ("minicpmv", "query_num", {}, "query_num must be a positive number, not {}"),
        ("internvl", "text_config.model_type", ["qwen2"], "model_type ['qwen2'] is not supported"),
        ("internvl", "vision_config.attention_bias", 0, "attention_bias must be true or false, not 0"),
        ("internvl", "vision_config.patch_size", [[14], [14]], "patch_size must be a positive number, not [14]"),
        ("internvl_chat", "template", {}, "template {} is not supported"),
        ("internvl_chat", "use_thumbnail", "yes", "use_thumbnail must be true or false, not 'yes'"),
        ("internvl_chat", "llm_config.bias", None, "bias = None is not supported"),
        ("internvl_chat", "llm_config.architectures", ["Qwen2ForCausalLM"], "(only ['InternLM2ForCausalLM'] or None)"),
    ],
)
def test_a_field_that_cannot_be_used_is_one_line(model_type, path, value, expected) -> None:
    assert expected in refusal(changed(BY_MODEL_TYPE[model_type], path, value))


def test_fields_that_the_classes_of_the_published_code_would_fill_otherwise() -> None:
    message = refusal({name: value for name, value in BY_MODEL_TYPE["minicpmv"].items() if name != "drop_vision_last_layer"})
    assert "drop_vision_last_layer = True is not supported" in message
    assert "bias = True is not supported" in refusal(text_changed("internvl_chat", bias=...))


LLAVA_ORIGINAL = {
    "llava_llama": "llava-hf/llava-1.5-7b-hf or llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}


@pytest.mark.parametrize("model_type", LLAVA_ORIGINAL)
def test_the_original_layout_of_llava_is_refused_with_the_name_of_the_other(model_type: str) -> None:
    what = f"config.json: model_type '{model_type}' is LLaVA's original layout; use the -hf model, such as "
    assert refusal({"model_type": model_type, "mm_vision_tower": "openai/clip-vit"}) == what + LLAVA_ORIGINAL[model_type]


def test_an_original_llava_that_calls_itself_llava_is_refused_too() -> None:
    original = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 4096}
    what = "config.json: is LLaVA's original layout; use the -hf model, such as llava-hf/llava-"
    assert refusal(original) == f"{what}1.5-7b-hf"
    assert refusal(original | {"mm_patch_merge_type": "spatial_unpad"}) == f"{what}v1.6-vicuna-7b-hf"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llava-1.5-7b", published.llava(published.VICUNA)),
        ("llava-1.5-13b", published.llava(published.VICUNA_13B)),
        ("llava-next-vicuna-7b", published.llava_next(published.VICUNA)),
        ("llava-next-mistral-7b", published.llava_next(published.MISTRAL)),
        *((name.replace("_", "."), published.internvl(name)) for name in ("internvl3_5-1b", "internvl3_5-4b", "internvl3_5-8b")),
        *((name, published.qwen3_vl(published.QWEN3_VL_SIZES[name])) for name in ("qwen3-vl-4b", "qwen3-vl-8b")),
    ],
)
def test_short_names_have_the_sizes_of_published_models(name: str, fields: dict[str, Any]) -> None:
    sizes, names = decoder(fields), [field.name for field in dataclass_fields(DecoderSizes)]
    assert {n: getattr(PUBLISHED_DECODERS[name], n) for n in names} == {n: getattr(sizes, n) for n in names}
