"""LLaVA-1.5 (arXiv 2310.03744)."""

from rlens_jax.families.family import Family
from rlens_jax.families.llava.model import ORIGINAL, LlavaConfig, VisionTower, read_config
from rlens_jax.families.llava.preparer import LlavaPreparer, benchmark_prompt, image_arrays, image_sizes, measure
from rlens_jax.families.llava.reference import REFERENCE
from rlens_jax.families.llava.weights import table
from rlens_jax.families.siglip import tower_attention

FAMILY = Family[LlavaConfig](
    model_types={"llava": read_config},
    vision=VisionTower,
    preparer=LlavaPreparer,
    image_sizes=image_sizes,
    image_arrays=image_arrays,
    measure=measure,
    table=table,
    reference=REFERENCE,
    benchmark_prompt=benchmark_prompt,
    preset="llava_1_5_7b",
    attention=lambda config: tower_attention(config.vision, class_token=True, patches=1, view=config.vision.num_patches),
    grid=lambda config: config.vision.side,
    refused={
        "llava_llama": f"{ORIGINAL} llava-hf/llava-1.5-7b-hf or llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava_mistral": f"{ORIGINAL} llava-hf/llava-v1.6-mistral-7b-hf",
    },
)
