"""A family small enough to read at once: one colour per patch, and text as bytes."""

from rlens_jax.families.family import Family
from tests.families.toy_family.model import ToyConfig, ToyVision, read_config
from tests.families.toy_family.preparer import ToyPreparer, benchmark_prompt, image_arrays, image_sizes, measure
from tests.families.toy_family.reference import REFERENCE
from tests.families.toy_family.weights import table

FAMILY = Family[ToyConfig](
    model_types={"toy": read_config},
    vision=ToyVision,
    preparer=ToyPreparer,
    image_sizes=image_sizes,
    image_arrays=image_arrays,
    measure=measure,
    table=table,
    reference=REFERENCE,
    benchmark_prompt=benchmark_prompt,
    preset="toy",
)
