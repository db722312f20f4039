"""Measure the memory and time of a conversion, and the memory of loading.

    python benchmarks/convert_memory.py --folder DISK [--gigabytes 16]

Makes a sharded bfloat16 checkpoint of random numbers with the layer widths of Qwen2-VL-7B and as many layers as the size needs,
and converts it in another process. Prints the peak of that process's anonymous and shared memory, and its time relative to
copying the files (with fsync) before and after. Then loads the result, sharded over four simulated devices.

The peak of the conversion should depend on the largest tensor and not on the size of the checkpoint: 1.4 GB for one of 2.3 GB.
Small checkpoints, of which the fixed cost is a large part, take several times as long as a copy.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from process_memory import measured

from rlens_jax.checkpoints.safetensors_file import Writer, entry_of
from rlens_jax.families.registry import read_kind

CONFIG = json.loads((Path(__file__).parent / "models" / "qwen2_vl_7b" / "config.json").read_text())
LAYER_BYTES, OTHER_BYTES = 466_117_632, 3_531_457_536
"""Sizes of one decoder layer and of all other weights, at full vocabulary."""
SHARD_BYTES = 4_000_000_000
CPU = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
LOAD = """
import sys
import jax, jax.numpy as jnp
from rlens_jax.sharding.mesh import make_mesh
from rlens_jax.checkpoints.checkpoint import load_model

load_model(sys.argv[1], jnp.bfloat16, mesh=make_mesh(jax.devices(), len(jax.devices())))
"""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; needs 3 times the size")
    options = parser.parse_args()
    folder = options.folder / "convert_memory"
    folder.mkdir(parents=True)
    try:
        size = make_checkpoint(folder / "source", options.gigabytes * 1e9)
        before = seconds_of_copy(folder)
        converted = folder / "converted"
        seconds, peak, _ = measured(["-m", "rlens_jax.convert", str(folder / "source"), str(converted)], CPU)
        after = seconds_of_copy(folder)
        _, loading, _ = measured(["-c", LOAD, str(converted)], CPU)
    finally:
        shutil.rmtree(folder)
    copying = (before + after) / 2
    print(
        json.dumps(
            {
                "gigabytes": size / 1e9,
                "peak_anonymous_and_shared_gigabytes": peak / 1e9,
                "seconds": seconds,
                "seconds_of_copying": [before, after],
                "relative_to_copying": seconds / copying,
                "peak_of_loading_relative_to_the_weights": loading / size,
            },
            indent=1,
        )
    )


def make_checkpoint(folder: Path, size: float) -> int:
    """Make a checkpoint of about `size` bytes: by its number of layers and, below 4 GB, a smaller vocabulary."""
    layers = max(1, round((size - OTHER_BYTES) / LAYER_BYTES))
    vocabulary = CONFIG["vocab_size"] if size > 4e9 else 32_000
    fields = CONFIG | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    fields |= {"image_token_id": vocabulary - 1, "video_token_id": vocabulary - 2}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    shards: list[list] = [[]]
    for name, tensor in read_kind(fields, "config.json").table().tensors.items():
        entry = entry_of(name, "BF16", tensor.shape)
        if shards[-1] and sum(e.num_bytes for e in shards[-1]) + entry.num_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    weight_map, rng = {}, np.random.default_rng(0)
    noise = rng.standard_normal(1 << 24, np.float32).astype(ml_dtypes.bfloat16)
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with Writer(folder / file, entries) as writer:
            for entry in entries:
                start = int(rng.integers(1 << 23))
                writer.write(entry.name, np.resize(noise[start:], entry.num_bytes // 2))
                weight_map[entry.name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(entry.num_bytes for entries in shards for entry in entries)


def seconds_of_copy(folder: Path) -> float:
    """Time to copy the weight files on the same disk."""
    began = time.monotonic()
    (folder / "copy").mkdir()
    for path in (folder / "source").glob("*.safetensors"):
        shutil.copyfile(path, folder / "copy" / path.name)
        with (folder / "copy" / path.name).open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(folder / "copy")
    return seconds


if __name__ == "__main__":
    main()
