"""InternVL2, 2.5, 3 and 3.5 (arXiv 2404.16821, 2412.05271, 2504.10479, 2508.18265), in both layouts of a model folder."""

from rlens_jax.families.family import Family
from rlens_jax.families.internvl.model import MERGE, NO_FLASH, InternVLConfig, VisionTower, read_hf_config, read_native_config
from rlens_jax.families.internvl.preparer import InternVLPreparer, benchmark_prompt, image_arrays, image_sizes, measure
from rlens_jax.families.internvl.reference import REFERENCE
from rlens_jax.families.internvl.weights import table
from rlens_jax.families.siglip import tower_attention

FAMILY = Family[InternVLConfig](
    model_types={"internvl": read_hf_config, "internvl_chat": read_native_config},
    vision=VisionTower,
    preparer=InternVLPreparer,
    image_sizes=image_sizes,
    image_arrays=image_arrays,
    measure=measure,
    table=table,
    reference=REFERENCE,
    benchmark_prompt=benchmark_prompt,
    # The code of the checkpoint gives its text model embeddings.
    penalises_prompt=lambda config: config.native is None,
    limits=("max_tiles", "total_tiles"),
    preset="internvl2_8b",
    attention=lambda config: tower_attention(config.vision, class_token=True, patches=MERGE**2, view=config.vision.num_patches),
    grid=lambda config: config.vision.patches_per_side // MERGE,
    refused={"internvl_flash": f"is InternVL3.5-Flash, which {NO_FLASH}"},
)
