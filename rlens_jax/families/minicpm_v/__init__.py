"""MiniCPM-V 2.6 (arXiv 2408.01800)."""

from rlens_jax.families.family import Family
from rlens_jax.families.minicpm_v.model import MiniCPMVConfig, VisionTower, read_config
from rlens_jax.families.minicpm_v.preparer import MiniCPMVPreparer, benchmark_prompt, image_arrays, image_sizes, measure
from rlens_jax.families.minicpm_v.reference import REFERENCE
from rlens_jax.families.minicpm_v.weights import table

FAMILY = Family[MiniCPMVConfig](
    model_types={"minicpmv": read_config},
    vision=VisionTower,
    preparer=MiniCPMVPreparer,
    image_sizes=image_sizes,
    image_arrays=image_arrays,
    measure=measure,
    table=table,
    reference=REFERENCE,
    benchmark_prompt=benchmark_prompt,
    # The code of the checkpoint gives its text model embeddings.
    penalises_prompt=lambda config: False,
    limits=("max_slices",),
    preset="minicpm_v_2_6",
)
