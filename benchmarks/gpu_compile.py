"""Compile the prefill of a published model for an H100, on a machine without a GPU.

    JAX_PLATFORMS=cpu python benchmarks/gpu_compile.py [--model FOLDER] [--visual 1792 8192] [--batches 1 8]

It needs the extra `cuda` (XLA's compiler for GPUs, and cuDNN's library, which tells its version), and only the config.json of
the model. The engine's own programs are compiled in bfloat16 for one card of 80 GB: the vision tower for one image, the prefill,
dense and with both reductions in the later half, and what `compute.batch_size: 0` would choose. It prints seconds to compile,
the memory of temporaries by XLA's analysis, and the calls of cuDNN in the compiled program. XLA leaves it to the card to build
cuDNN's kernels and to tune its own, so this says nothing about whether cuDNN accepts the calls, nor about numbers and times.

Expect, for Qwen2-VL-7B (16.6 GB of weights): 0.15 and 1.2 GB for a tower of 8192 and 65,536 patches; dense and reduced alike 0.5
and 1.0 GB for 1792 and 8192 visual tokens, 1.7 and 6.3 GB for eight rows of them; 2 to 21 seconds each; 3 calls dense, and 6
with half of the layers reduced. XLA warns of a sort that it would do faster with a card at hand, and of programs that do not
fit.
"""

import argparse
import time
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.config import ComputeConfig, RunConfig
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.sizes import abstract_images, abstract_model, bytes_on_device, decoder_arguments, fitting_batch_size
from rlens_jax.engine.timing import TEXT_AFTER, TEXT_BEFORE, static_prefill
from rlens_jax.layout import Bucket
from rlens_jax.plans import Plan, Reduction
from rlens_jax.sharding.mesh import make_mesh

MEMORY = 80_000_000_000
H100 = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: {MEMORY}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA H100"
"""
JAX_SHARE = 0.75
"""Of the memory, which JAX takes by default."""
TEXT = TEXT_BEFORE + TEXT_AFTER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="benchmarks/models/qwen2_vl_7b", help="a folder with a config.json")
    parser.add_argument("--visual", type=int, nargs="+", default=[1792, 8192], help="numbers of visual tokens")
    parser.add_argument("--patches", type=int, nargs="*", default=[8192, 65536], help="patches of an image (Qwen's towers)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    options = parser.parse_args()
    devices: Any = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=H100).devices
    kind, mesh = read_model_kind(options.model), make_mesh(devices, 1)
    model = abstract_model(kind, jnp.bfloat16, mesh)
    programs = Programs(model, mesh, Reduction(), seed=0, new_tokens=1, stop_tokens=(0,))
    weights = bytes_on_device(nnx.state(model)) / 1e9
    print(f"{options.model} on {devices[0].device_kind}: {weights:.1f} GB of weights, {programs.kernel} attention", flush=True)
    for patches in options.patches:
        tower = programs.encode_program.lower(abstract_images(kind.image_arrays((patches,)), 1, mesh))
        report(f"tower of {patches} patches", tower)
    layers = kind.config.decoder.num_layers
    half = tuple(range(layers // 2, layers))
    for tokens in options.visual:
        for batch in options.batches:
            visual, prompts, _ = decoder_arguments(programs, Bucket(TEXT, tokens), batch)[programs.generate_program]
            for name, plan in (("dense", Plan()), ("both in the later half", Plan(half, half))):
                lowered = static_prefill(programs, plan).lower(visual, prompts)
                report(f"{tokens} visual tokens, batch {batch}, {name}", lowered)
    config, available = RunConfig(compute=ComputeConfig(dtype="bfloat16")), int(JAX_SHARE * MEMORY)
    for tokens in options.visual:
        rows = fitting_batch_size(config, kind, mesh, available, Bucket(TEXT, tokens), 64)
        print(f"compute.batch_size: 0 takes {rows} rows of {tokens} visual tokens (of at most 64)", flush=True)


def report(what: str, lowered: Any) -> None:
    """Compile, and print what it took and what the program takes."""
    start = time.monotonic()
    compiled = lowered.compile()
    calls = compiled.as_text().count('custom_call_target="__cudnn$fmha')
    gigabytes, took = compiled.memory_analysis().temp_size_in_bytes / 1e9, time.monotonic() - start
    print(f"{what}: {took:.0f} s, {gigabytes:.2f} GB, {calls} calls of cuDNN", flush=True)


if __name__ == "__main__":
    main()
