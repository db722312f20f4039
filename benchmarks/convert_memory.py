"""Memory and time of a conversion, and memory of loading: `python benchmarks/convert_memory.py --gigabytes 16 --folder DISK`.

Makes a sharded bfloat16 checkpoint of random numbers with the layer widths of Qwen2-VL-7B (as many layers as the size asks for),
converts it in a process of its own, and prints the peak of that process's anonymous and shared memory and its time relative to
copying the files (with fsync) just before and just after. Then the result is loaded, sharded over four simulated devices.
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
from rlens_jax.families.tables import table_of

CONFIG = {
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14},
}
LAYER_BYTES, OTHER_BYTES = 466_117_632, 3_531_457_536
"""Of a decoder layer, and of all else, at full vocabulary."""
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
    parser = argparse.ArgumentParser(description=__doc__)
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
    """A checkpoint of about `size` bytes, by the number of layers and, below 4 GB, by a smaller vocabulary."""
    layers = max(1, round((size - OTHER_BYTES) / LAYER_BYTES))
    vocabulary = CONFIG["vocab_size"] if size > 4e9 else 32_000
    fields = CONFIG | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    fields |= {"image_token_id": vocabulary - 1, "video_token_id": vocabulary - 2}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    shards: list[list] = [[]]
    for name, tensor in table_of(read_kind(fields, "config.json")).tensors.items():
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
    """Copying the weight files beside themselves, to the disk."""
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
