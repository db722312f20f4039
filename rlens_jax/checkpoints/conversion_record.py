"""conversion.json of a converted folder: what its source held, and checksums of what the store holds.

format      "rlens-conversion/1"
source      name as typed, without parent folders; revision on the hub or null
model_type  as in config.json
dtype       null, or the dtype to which all used tensors were rounded
versions    versions of Python and of the recorded packages
files       files of the source: name, bytes, sha256
tensors     tensors of the source, in its order and spelling: name, file, shape, dtype (as stored here), num_bytes
carried     tensors that the model does not use: name, reason
leaves      checksum of each leaf of the store (see `checksum`); conversions of older versions have none
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.containment import inside
from rlens_jax.checkpoints.safetensors_file import Entry
from rlens_jax.console import say
from rlens_jax.errors import UserError
from rlens_jax.families.table import Problems
from rlens_jax.files import check_schema, read_json_object

FORMAT = "rlens-conversion/1"
RECORD = "conversion.json"
_SCHEMA_FILE = Path(__file__).with_name("conversion.schema.json")


@dataclass(frozen=True)
class Record:
    """The parts of conversion.json that later steps read."""

    path: Path
    tensors: list[tuple[str, Entry]]
    """File of the source, and tensor, in the order of the source."""
    carried: Mapping[str, str]
    """Reasons by name."""
    leaves: Mapping[str, str] | None
    """Checksums by `leaf_name`; None for a conversion of an older version."""

    def check(self, leaves: Mapping[str, np.ndarray], problems: Problems) -> None:
        """Add a problem for each leaf that has another checksum than its conversion recorded."""
        for name, array in leaves.items():
            if self.leaves is not None and checksum(array) != self.leaves.get(name):
                problems.add(orbax_store.STORE, name, f"differs from its checksum in {RECORD}: damaged since its conversion")


def checksum(array: np.ndarray) -> str:
    """SHA-256, in hex, over dtype, shape and bytes of an array."""
    digest = hashlib.sha256(f"{array.dtype} {list(array.shape)} ".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read_record(folder: Path) -> Record:
    """Read the record of a converted folder.

    Raises:
        UserError: there is none, it has another format or a wrong field, names a tensor twice, or names a file that does not
            lie in the folder of its source or is none of its files.
    """
    path = folder / RECORD
    if not path.exists():
        raise UserError(f"{path}: no such file; only a folder written by rlens_jax.convert can be converted back")
    fields = read_json_object(path)
    if fields.get("format") != FORMAT:
        raise UserError(f"{path}: has the format {fields.get('format')!r}, this version reads {FORMAT!r}")
    check_schema(fields, _SCHEMA_FILE, path)
    tensors = [
        (inside(folder, item["file"], path).name, Entry(item["name"], item["dtype"], tuple(item["shape"]), item["num_bytes"]))
        for item in fields["tensors"]
    ]
    names = [entry.name for _, entry in tensors]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: tensors: {next(name for name in names if names.count(name) > 1)} is there twice")
    listed = {item["name"] for item in fields["files"]}
    if unknown := next((file for file, _ in tensors if file not in listed), None):
        raise UserError(f"{path}: tensors: {unknown} is none of the files of the source")
    return Record(path, tensors, {item["name"]: item["reason"] for item in fields["carried"]}, fields.get("leaves"))


def verify_store(folder: Path, reader: orbax_store.Reader) -> None:
    """Compare all leaves of a converted folder, which `reader` reads, with their checksums; say so if it has none.

    Raises:
        UserError: leaves are damaged, missing or not known; one message lists them.
    """
    record = read_record(folder) if (folder / RECORD).exists() else None
    if record is None or record.leaves is None:
        say(f"{folder}: was converted without checksums, so damage cannot be noticed; convert it again to have them")
        return
    problems = Problems(str(folder))
    for name in sorted(record.leaves.keys() - set(reader.names)):
        problems.add(orbax_store.STORE, name, "missing")
    for names in reader.groups():
        record.check(reader.read(names), problems)
    problems.raise_any()
