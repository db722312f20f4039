"""LLaVA-OneVision (arXiv 2408.03326)."""

from rlens_jax.families.family import Family
from rlens_jax.families.llava_onevision.model import LlavaOnevisionConfig, VisionTower, read_config
from rlens_jax.families.llava_onevision.preparer import (
    LlavaOnevisionPreparer,
    benchmark_prompt,
    image_arrays,
    image_sizes,
    measure,
)
from rlens_jax.families.llava_onevision.reference import REFERENCE
from rlens_jax.families.llava_onevision.weights import table
from rlens_jax.families.siglip import tower_attention

FAMILY = Family[LlavaOnevisionConfig](
    model_types={"llava_onevision": read_config},
    vision=VisionTower,
    preparer=LlavaOnevisionPreparer,
    image_sizes=image_sizes,
    image_arrays=image_arrays,
    measure=measure,
    table=table,
    reference=REFERENCE,
    benchmark_prompt=benchmark_prompt,
    preset="llava_onevision_7b",
    attention=lambda config: tower_attention(config.vision, class_token=False, patches=1, view=config.side**2),
    refused={"llava_qwen": "is LLaVA's original layout; use the -hf model, such as llava-hf/llava-onevision-qwen2-7b-ov-hf"},
)
