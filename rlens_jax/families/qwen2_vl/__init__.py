"""Qwen2-VL (arXiv 2409.12191)."""

from rlens_jax.families.family import Family
from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig, VisionTower, read_config
from rlens_jax.families.qwen2_vl.preparer import Qwen2VLPreparer, benchmark_prompt, image_arrays, image_sizes, measure
from rlens_jax.families.qwen2_vl.reference import REFERENCE
from rlens_jax.families.qwen2_vl.weights import table
from rlens_jax.families.siglip import tower_attention

FAMILY = Family[Qwen2VLConfig](
    model_types={"qwen2_vl": read_config},
    vision=VisionTower,
    preparer=Qwen2VLPreparer,
    image_sizes=image_sizes,
    image_arrays=image_arrays,
    measure=measure,
    table=table,
    reference=REFERENCE,
    benchmark_prompt=benchmark_prompt,
    limits=("min_pixels", "max_pixels"),
    preset="qwen2_vl_7b",
    attention=lambda config: tower_attention(config.vision, class_token=False, patches=config.vision.merge_size**2, view=None),
)
