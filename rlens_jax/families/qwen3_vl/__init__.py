"""Qwen3-VL, the dense models (arXiv 2511.21631)."""

from functools import partial

from rlens_jax.data.benchmarks.catalogue import default_prompt
from rlens_jax.families.family import Family
from rlens_jax.families.qwen2_vl.preparer import Qwen2VLPreparer, image_arrays, image_sizes, measure
from rlens_jax.families.qwen2_vl.reference import REFERENCE
from rlens_jax.families.qwen3_vl.model import Qwen3VLConfig, VisionTower, read_config
from rlens_jax.families.qwen3_vl.preparer import PUBLISHED_PIXELS
from rlens_jax.families.qwen3_vl.weights import table
from rlens_jax.families.siglip import tower_attention

FAMILY = Family[Qwen3VLConfig](
    model_types={"qwen3_vl": read_config},
    vision=VisionTower,
    preparer=Qwen2VLPreparer,
    image_sizes=image_sizes,
    image_arrays=image_arrays,
    measure=partial(measure, published=PUBLISHED_PIXELS),
    table=table,
    reference=REFERENCE,
    # VLMEvalKit's entries switch its own prompts off.
    benchmark_prompt=lambda instance, config, step_by_step: default_prompt(instance),
    limits=("min_pixels", "max_pixels"),
    preset="qwen3_vl_8b",
    attention=lambda config: tower_attention(config.vision, class_token=False, patches=config.vision.merge_size**2, view=None),
)
