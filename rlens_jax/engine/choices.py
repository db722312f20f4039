"""What a run chooses by itself where its configuration leaves a field open."""

from dataclasses import replace

from jax.sharding import Mesh

from rlens_jax.config import ComputeConfig, Dtype, RunConfig


def automatic_dtype(platform: str) -> Dtype:
    """bfloat16 on an accelerator, as models are published; float32 on a CPU, which has no fast bfloat16 products."""
    return "float32" if platform == "cpu" else "bfloat16"


def dtype_on(mesh: Mesh, compute: ComputeConfig) -> Dtype:
    """The dtype of a run on these devices."""
    return compute.dtype or automatic_dtype(mesh.devices.flat[0].platform)


def with_dtype(config: RunConfig, platform: str) -> RunConfig:
    """The configuration of a run on devices of this platform of JAX, with its dtype filled in."""
    return replace(config, compute=replace(config.compute, dtype=config.compute.dtype or automatic_dtype(platform)))
