"""Run by test_for_tpu.py in a process of its own: compiles the decoder's layers and the vision tower of a model of the paper for
a v5e:16x16 slice.

Prints a JSON line a model: how many hosts a copy of it is on, and whether a kernel fetches the units of reduced layers. Of the
model that is compiled it has every collective of the program, and whether it is in the loop over layers, and what is made in HBM
that is as large as an FFN's matrix, of one layer or of all. Models have two layers, since the loop's body is the same whatever
their number. Of the tower the last line has the HBM traffic of a layer, the kernel's share of it, and the largest array.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlens_jax.config import ComputeConfig, RunConfig
from rlens_jax.dry_run.costs import custom_call_cost
from rlens_jax.dry_run.hlo import parse_module
from rlens_jax.dry_run.program import CompiledProgram, ProgramSpec, compile_program, program_specs
from rlens_jax.dry_run.topology import find_slice, slice_devices
from rlens_jax.families.registry import read_kind
from rlens_jax.layout import Bucket
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.sharding.mesh import make_mesh

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
CASES = (("qwen2_vl_7b", 4), ("internvl2_8b", 8))
"""Models and sizes of the `model` axis; the first one is compiled, which takes more than a minute. LLaVA-OneVision-7B and
MiniCPM-V 2.6 have the decoder layers of Qwen2-VL-7B."""
QUICK = {"exec_time_optimization_effort": -1.0}
"""Two thirds of the time. What is read off the decoder is how it is partitioned and stored, not how fast it is."""
PATCHES = 65536
"""The largest image of the published settings of Qwen2-VL."""


def short(fields: dict) -> dict:
    """A config.json with two layers in its text model."""
    for holder in (fields, fields.get("text_config"), fields.get("llm_config")):
        if isinstance(holder, dict) and "num_hidden_layers" in holder:
            holder["num_hidden_layers"] = 2
    return fields


def copies_of_matrices(text: str, layers: int, numbers: int) -> list[str]:
    """Instructions that make an array in HBM with as many numbers as a matrix, of one layer or of all."""
    module = parse_module(text).computations
    fused = {item.called["calls"] for body in module.values() for item in body if item.opcode == "fusion"}
    return [
        f"{item.opcode} {item.name} {shape}"
        for name, body in module.items()
        if name not in fused
        for item in body
        if item.opcode in ("copy", "copy-start", "fusion", "custom-call", "dynamic-slice", "transpose")
        for shape in item.shapes[:1]
        if shape.in_hbm and shape.elements in (numbers, layers * numbers)
    ]


def tower(devices: list, memory_limit: int) -> dict:
    """Qwen2-VL-7B's tower, two layers of it, for an image of PATCHES patches on four shards."""
    name, shards = CASES[0]
    fields = short(json.loads((MODELS / name / "config.json").read_text()))
    fields["vision_config"]["depth"] = 2
    config = RunConfig(compute=ComputeConfig(dtype="bfloat16", model_shards=shards))
    (spec,) = program_specs(config, read_kind(fields, name), make_mesh(devices, shards), {}, {(PATCHES,): 1})
    compiled = spec.lower().compile()
    once = SimpleNamespace(compile=lambda: compiled)
    found = compile_program(replace(spec, lower=lambda: once), (256 // shards, shards), 0, memory_limit)
    assert isinstance(found, CompiledProgram), found
    assert found.costs["dense"].layer is not None
    module = parse_module(compiled.as_text()).computations
    kernels = [(item, body) for body in module.values() for item in body if "/tower_attention/" in item.attributes]
    return {
        "model": "tower",
        "shards": shards,
        "traffic": found.costs["dense"].layer.bytes,
        "of_kernels": [custom_call_cost(item, body).bytes for item, body in kernels if item.opcode == "custom-call"],
        "largest": max(shape.elements for body in module.values() for item in body for shape in item.shapes),
    }


def compiled_facts(layers: ProgramSpec, compiled: Any, decoder: DecoderConfig, shards: int, memory_limit: int) -> dict[str, Any]:
    """What the compiled program exchanges and copies, and the bytes of states and scores to compare with."""
    once = SimpleNamespace(compile=lambda: compiled)
    mesh = 256 // shards, shards
    found = compile_program(replace(layers, layers=2, lower=lambda: once), mesh, resident_bytes=0, memory_limit=memory_limit)
    assert isinstance(found, CompiledProgram), found
    return {
        "states": 2 * (128 + 512) * decoder.width * 2,
        "scores": 2 * decoder.ffn_width * 4,
        "copies": copies_of_matrices(compiled.as_text(), 2, decoder.ffn_width // shards * decoder.width),
        "collectives": [
            {
                "kind": item.kind,
                "axis": item.axis,
                "bytes": item.bytes,
                "branches": list(map(str, item.branches)),
                "in_layer_loop": item.in_layer_loop,
            }
            for item in found.collectives
        ],
    }


def main() -> None:
    """Compile and print."""
    where = find_slice("v5e:16x16")
    devices = slice_devices(where)
    for name, shards in CASES:
        kind = read_kind(short(json.loads((MODELS / name / "config.json").read_text())), name)
        config = RunConfig(compute=ComputeConfig(dtype="bfloat16", model_shards=shards))
        mesh = make_mesh(devices, shards)
        specs = program_specs(config, kind, mesh, {Bucket(128, 512): 2}, {})
        (layers,) = (spec for spec in specs if spec.name == "layers")
        lowered = layers.lower()
        facts = {
            "model": name,
            "shards": shards,
            "hosts": max(len({device.process_index for device in group}) for group in mesh.devices),
            "fetches_units": "fetched_ffn" in lowered.as_text(),
        }
        if (name, shards) == CASES[0]:
            facts |= compiled_facts(layers, lowered.compile(QUICK), kind.config.decoder, shards, where.memory_limit)
        print(json.dumps(facts), flush=True)
    print(json.dumps(tower(devices, where.memory_limit)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
