"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with attention within windows, a gated MLP and RMSNorm in its tower."""

from rlens_jax.data.benchmarks.catalogue import default_prompt
from rlens_jax.families.family import Family
from rlens_jax.families.qwen2_5_vl.model import Qwen25VLConfig, VisionTower, read_config
from rlens_jax.families.qwen2_5_vl.weights import table
from rlens_jax.families.qwen2_vl.preparer import Qwen2VLPreparer, image_arrays, image_sizes, measure
from rlens_jax.families.qwen2_vl.reference import REFERENCE
from rlens_jax.families.siglip import tower_attention

FAMILY = Family[Qwen25VLConfig](
    model_types={"qwen2_5_vl": read_config},
    vision=VisionTower,
    preparer=Qwen2VLPreparer,
    image_sizes=image_sizes,
    image_arrays=image_arrays,
    measure=measure,
    table=table,
    reference=REFERENCE,
    # VLMEvalKit gives it the prompts of a model that has none of its own, unlike Qwen2-VL.
    benchmark_prompt=lambda instance, config, step_by_step: default_prompt(instance),
    limits=("min_pixels", "max_pixels"),
    preset="qwen2_5_vl_7b",
    attention=lambda config: tower_attention(config.vision, class_token=False, patches=config.vision.merge_size**2, view=None),
)
