"""The embedded model with its first layers only: commands run as with the whole one, in less time."""

import json
import re
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from rlens_jax.resources import embedded_model


def save_first_layers(folder: Path, num_layers: int) -> Path:
    """Write a folder that must not exist yet, and return it."""
    shutil.copytree(embedded_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    assert "layer_types" not in config
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    layer = re.compile(r"model\.layers\.(\d+)\.")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in tensors.items() if not (found := layer.match(name)) or int(found[1]) < num_layers}
    save_file(kept, folder / "model.safetensors")
    return folder
