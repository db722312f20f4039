"""The start of a run: model files, samples, JAX, the identity of the work, its journal, and the model on its mesh."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlens_jax.checkpoints.checkpoint import find_model, load_model, model_hash, read_model_kind
from rlens_jax.config import ComputeConfig, DataConfig, SearchConfig
from rlens_jax.console import Progress, say
from rlens_jax.data.splits import Splits, load_splits, samples_hash
from rlens_jax.engine.inputs import Split, build_split, own_samples
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.sizes import Shapes, device_bytes, fitting_batch_size
from rlens_jax.engine.startup import CompilationCounter, start_jax
from rlens_jax.families.registry import ModelKind
from rlens_jax.hosts.processes import Processes
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import Preparer
from rlens_jax.plan import Reduction
from rlens_jax.resources import cache_folder
from rlens_jax.search.journal import Journal
from rlens_jax.sharding.mesh import check_fits, make_mesh


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint on disk: its description is read, its weights are not."""

    path: Path
    kind: ModelKind
    weights_hash: str

    @classmethod
    def find(cls, model: str | Path, processes: Processes) -> "ModelFolder":
        """The folder that `model` names; UserError unless it holds a supported model."""
        path = processes.agreed(lambda: find_model(model))
        weights_hash = processes.agreed(lambda: model_hash(path))
        return cls(path, processes.agreed(lambda: read_model_kind(path)), weights_hash)

    def identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What must agree before finished work is resumed: the weights, the kind of device, JAX, and `settings`."""
        device = jax.devices()[0].device_kind
        return {"model_hash": self.weights_hash, "device": device, "jax": version("jax"), **settings}


def start(compute: ComputeConfig, output: Path, processes: Processes) -> CompilationCounter:
    """Start JAX as `start_jax`; the compilation cache is the configured one, or one that all processes see.

    JAX lets only process 0 write compiled programs. The other processes read them from the shared output folder.
    """
    shared = cache_folder() if processes.count == 1 else output
    return start_jax(compute.matmul_precision, Path(compute.compilation_cache or shared / "compiled"))


@dataclass(frozen=True)
class Session:
    """A run whose inputs are known and whose journal is open."""

    folder: ModelFolder
    splits: Splits
    data_hash: str
    journal: Journal
    resumed: int
    """Evaluations in the journal that an earlier run made."""
    processes: Processes

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: ModelFolder,
        output: Path,
        data: DataConfig,
        settings: Mapping[str, Any],
        processes: Processes,
        *,
        seed: int,
        step_by_step: bool = False,
    ) -> Iterator["Session"]:
        """Read the samples and open the journal in `output`; all processes agree on each.

        Args:
            folder: the model.
            output, data, seed: as in `RunConfig`.
            settings: the values that decide the outcomes (`RunConfig.deciding_settings`).
            processes: the processes of the run.
            step_by_step: whether the model may reason before it answers.

        Raises:
            UserError: unusable samples, or a journal that belongs to other inputs or settings.
        """
        processes.check_shared(output)
        prompt = partial(folder.kind.benchmark_prompt, step_by_step=step_by_step)
        read = partial(load_splits, data, prompt, seed=seed)
        # The first process to need a dataset prepares it in the cache, which the processes may share.
        splits = processes.in_order(read, read)
        data_hash = samples_hash(splits)
        identity = folder.identity({"data_hash": data_hash, **settings})
        processes.check_same(identity)
        with processes.in_order(lambda: Journal.open(output, identity), lambda: Journal.follow(output, identity)) as journal:
            if journal.repaired:
                say(journal.repaired)
            resumed = len(journal.records())
            processes.check_same({"finished evaluations": resumed})
            yield cls(folder, splits, data_hash, journal, resumed, processes)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its mesh, and the preparer of its inputs."""

    mesh: Mesh
    module: VisionLanguageModel
    preparer: Preparer
    shapes: Shapes

    def programs(self, reduction: Reduction, *, seed: int, new_tokens: int) -> Programs:
        """The programs of a search over this model; arguments as of `Programs`."""
        stop_token = self.preparer.chat.stop_token
        return Programs(self.module, self.mesh, reduction, seed=seed, new_tokens=new_tokens, stop_token=stop_token)


def load(folder: ModelFolder, compute: ComputeConfig, reduction: Reduction, search: SearchConfig) -> LoadedModel:
    """Load the model on all devices; an open batch size becomes the largest that fits into their memory.

    Raises:
        UserError: the mesh does not divide devices or model, not one row fits into memory, or the folder is not usable.
    """
    kind = folder.kind
    check_fits(kind.config.decoder.sizes, compute.model_shards)
    mesh = make_mesh(jax.devices(), compute.model_shards)
    rows = compute.batch_size or fitting_batch_size(compute, reduction, search, kind, mesh, device_bytes(mesh))
    _, module = load_model(folder.path, jnp.dtype(compute.dtype), mesh=mesh)
    preparer = kind.preparer(folder.path, compute.patch_slots)
    shapes = Shapes(compute.text_slots, compute.visual_slots, rows, kind.config.decoder.context)
    return LoadedModel(mesh, module, preparer, shapes)


def encode_splits(session: Session, loaded: LoadedModel, programs: Programs, *, with_answers: bool) -> dict[str, Split]:
    """Prepare, encode and batch the samples of all splits, with progress; arguments and errors as of `build_split`."""
    splits = {}
    for name, samples in session.splits.items():
        with Progress(f"preparing {name}", len(own_samples(len(samples), programs)), "samples") as bar:
            splits[name] = build_split(
                samples, loaded.preparer, programs, loaded.shapes, with_answers, bar.advance, session.processes
            )
    return splits
