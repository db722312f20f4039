"""Load model folders: config.json with published safetensors (one file or several) or with our Orbax store."""

import hashlib
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.conversion_record import verify_store
from rlens_jax.checkpoints.leaves import Filler, shapes_of
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.checkpoints.published import CONFIG, opened, weight_files
from rlens_jax.config import FfnPath
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind, read_kind
from rlens_jax.families.table import Problems
from rlens_jax.files import read_json_object
from rlens_jax.mirrors import sha256
from rlens_jax.models.forward import VisionLanguageModel

HEAD_LEAF = "decoder.head"


def read_model_kind(model: str | Path) -> ModelKind:
    """Family and sizes of a model, from its config.json. Raises UserError as `find_model` and `kind_in`."""
    return kind_in(find_model(model, weights=False))


def kind_in(folder: Path) -> ModelKind:
    """Family and sizes of the model in a folder that `find_model` returned. UserError as `read_kind`, or without config.json."""
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{path}: no such file; a model folder holds config.json and *.safetensors")
    return read_kind(read_json_object(path), str(path))


def open_store(folder: Path) -> tuple[ModelKind, orbax_store.Reader]:
    """The kind and the leaves of a converted folder. A head that is stored is used, whatever config.json says.

    Raises:
        UserError: as `kind_in`, or the store is damaged.
    """
    kind, reader = kind_in(folder), orbax_store.Reader(folder)
    return (kind.with_own_head() if HEAD_LEAF in reader.names else kind), reader


def load_model(
    model: str | Path,
    dtype: DTypeLike,
    check_finite: bool = True,
    mesh: Mesh | None = None,
    verify: bool = False,
    ffn_path: FfnPath = "auto",
) -> tuple[ModelKind, VisionLanguageModel]:
    """Load a model with its weights rounded to `dtype`.

    Tensors are read one at a time and written into stacked parameters in place: the peak memory is the model and one tensor,
    or the model and one layer for an Orbax store, of which each process reads its own shards only.

    Args:
        model: a folder or name, as of `find_model`.
        dtype: dtype of the parameters; float32 or bfloat16.
        check_finite: refuse weights that are not finite.
        mesh: parameters are split over it as in `rlens_jax.sharding.mesh`; None puts all on the first device.
        verify: compare a converted folder with the checksums of its conversion first, see `verify_store`.
        ffn_path: how reduced layers compute visual tokens.

    Raises:
        UserError: no kernel fetches such units on these devices, the folder does not exist, or its config.json or weights are
            not usable; one message lists all problems with the weights.
    """
    folder = find_model(model)
    problems = Problems(str(folder))
    if orbax_store.is_store(folder):
        kind, reader = open_store(folder)
        if verify:
            verify_store(folder, reader)
        filler = Filler(kind.abstract(dtype), mesh, ffn_path)
        reader.fill(filler, problems, check_finite)
        return kind, filler.model()
    with opened(weight_files(folder), kind_in(folder), problems) as published:
        kind, table = published.kind, published.table
        filler = Filler(kind.abstract(dtype), mesh, ffn_path)
        table.check_covers(shapes_of(filler.abstract))
        finite = []
        for name, tensor in table.tensors.items():
            for place, part in zip(tensor.places, tensor.to_ours(published.read(name)), strict=True):
                finite.append((published.matched[name], filler.put(place, filler.held(place, part))))
        for item in dict.fromkeys(item for item, flag in finite if check_finite and not flag):
            problems.add(item.file, item.name, "holds NaN or infinite values")
    problems.raise_any()
    return kind, filler.model()


def model_hash(model: str | Path) -> str:
    """SHA-256, in hex, over config.json and all weight files of a model folder and their names in it."""
    folder = find_model(model)
    total = hashlib.sha256()
    weights = orbax_store.files(folder) if orbax_store.is_store(folder) else weight_files(folder)
    for path in [folder / CONFIG, *weights]:
        try:
            digest = sha256(path)
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror})") from None
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()
