"""The search's program of Qwen2-VL-7B's decoder layers for a TPU slice that need not exist; a part of other benchmarks."""

import json
from pathlib import Path

from rlens_jax.config import ComputeConfig, FfnPath, RunConfig
from rlens_jax.dry_run.program import ProgramSpec, program_specs
from rlens_jax.dry_run.topology import find_slice, slice_devices
from rlens_jax.families.registry import ModelKind, read_kind
from rlens_jax.layout import Bucket
from rlens_jax.sharding.mesh import make_mesh

CONFIG = Path(__file__).with_name("models") / "qwen2_vl_7b" / "config.json"
TEXT, VISUAL = 384, 1664
LAYERS = 5
"""Fewer than the model's 28, so that it fits on a single chip; the body of the loop is the same. No batch has this size, so that
it distinguishes stacks of layers from batches."""


def model_kind(layers: int = LAYERS) -> ModelKind:
    """Qwen2-VL-7B with this number of layers."""
    return read_kind(json.loads(CONFIG.read_text()) | {"num_hidden_layers": layers}, "Qwen2-VL-7B")


def layer_program(
    topology: str, model: int, batch: int, layers: int = LAYERS, ffn_path: FfnPath = "auto"
) -> tuple[ProgramSpec, tuple[int, int]]:
    """The program in bfloat16 with `batch` samples per work group, and the sizes of the mesh's two axes."""
    devices = slice_devices(find_slice(topology))
    compute = ComputeConfig(dtype="bfloat16", model_shards=model, ffn_path=ffn_path)
    mesh = make_mesh(devices, model)
    rows = {Bucket(TEXT, VISUAL): batch}
    specs = program_specs(RunConfig(compute=compute), model_kind(layers), mesh, rows, {})
    (program,) = (spec for spec in specs if spec.name == "layers")
    return program, (len(devices) // model, model)
