"""LLaVA-NeXT (LLaVA 1.6, January 2024): LLaVA-1.5 with images of any resolution, on Vicuna, Mistral or Llama 3."""

from rlens_jax.families.family import Family
from rlens_jax.families.llava.preparer import benchmark_prompt
from rlens_jax.families.llava_next.model import LlavaNextConfig, VisionTower, read_config
from rlens_jax.families.llava_next.preparer import LlavaNextPreparer, image_arrays, image_sizes, measure
from rlens_jax.families.llava_next.reference import REFERENCE
from rlens_jax.families.llava_next.weights import table
from rlens_jax.families.siglip import tower_attention

FAMILY = Family[LlavaNextConfig](
    model_types={"llava_next": read_config},
    vision=VisionTower,
    preparer=LlavaNextPreparer,
    image_sizes=image_sizes,
    image_arrays=image_arrays,
    measure=measure,
    table=table,
    reference=REFERENCE,
    benchmark_prompt=benchmark_prompt,
    preset="llava_next_7b",
    attention=lambda config: tower_attention(config.vision, class_token=True, patches=1, view=config.vision.num_patches),
)
