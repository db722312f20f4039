"""The start of a run: the model's folder, samples, the journal of the run's work, and the model on its mesh."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlens_jax.checkpoints.checkpoint import load_model, model_hash, read_model_kind
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.config import RunConfig
from rlens_jax.console import Progress, say
from rlens_jax.data.splits import Splits, load_splits, samples_hash
from rlens_jax.engine.choices import dtype_on
from rlens_jax.engine.inputs import Split, build_split, own_samples
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.sizes import Shapes, device_bytes, fitting_batch_size
from rlens_jax.families.registry import ModelKind
from rlens_jax.hosts.processes import Processes
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import Preparer
from rlens_jax.search.journal import Journal
from rlens_jax.sharding.mesh import check_fits, make_mesh


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint on disk: its description is read, its weights are not."""

    path: Path
    kind: ModelKind

    @classmethod
    def find(cls, model: str | Path) -> "ModelFolder":
        """The folder that `model` names; UserError unless it describes a supported model."""
        path = find_model(model)
        return cls(path, read_model_kind(path))

    @cached_property
    def weights_hash(self) -> str:
        """Reads all weights on first use; UserError as `model_hash`."""
        return model_hash(self.path)

    def identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What must agree before finished work is resumed: the weights, the kind of device, JAX, and `settings`."""
        device = jax.devices()[0].device_kind
        return {"model_hash": self.weights_hash, "device": device, "jax": version("jax"), **settings}


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
    def open(cls, folder: ModelFolder, config: RunConfig, processes: Processes, *, restart: bool = False) -> Iterator["Session"]:
        """Read the samples and open the journal of a run; all processes agree on each. `restart` is as of `open_log`.

        Raises:
            UserError: unusable samples, or a journal that belongs to other inputs or settings.
        """
        output = Path(config.output)
        processes.check_shared(output)
        # A model that generates may reason before it answers; teacher forcing scores the bare answer.
        prompt = partial(folder.kind.benchmark_prompt, step_by_step=config.search.objective == "generation")
        read = partial(load_splits, config.data, prompt, seed=config.seed)
        # The first process to need a dataset prepares it in the cache, which the processes may share.
        splits = processes.in_order(read, read)
        data_hash = samples_hash(splits)
        identity = processes.agreed(lambda: folder.identity({"data_hash": data_hash, **config.deciding_settings()}))
        processes.check_same(identity)
        first, rest = partial(Journal.open, restart=restart), Journal.follow
        with processes.in_order(lambda: first(output, identity), lambda: rest(output, identity)) as journal:
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

    def programs(self, config: RunConfig) -> Programs:
        """The programs of a search over this model."""
        ends, new_tokens = self.preparer.chat.stop_tokens, config.search.max_new_tokens
        return Programs(self.module, self.mesh, config.reduction, seed=config.seed, new_tokens=new_tokens, stop_tokens=ends)


def load(folder: ModelFolder, config: RunConfig) -> LoadedModel:
    """Load the model on all devices; an open batch size becomes the largest that fits into their memory.

    Raises:
        UserError: the mesh does not divide devices or model, not one row fits into memory, or the folder is not usable.
    """
    kind, compute = folder.kind, config.compute
    check_fits(kind.config.decoder.sizes, compute.model_shards)
    mesh = make_mesh(jax.devices(), compute.model_shards)
    rows = compute.batch_size or fitting_batch_size(config, kind, mesh, device_bytes(mesh))
    _, module = load_model(folder.path, jnp.dtype(dtype_on(mesh, compute)), mesh=mesh)
    preparer = kind.preparer(folder.path, compute.patch_slots)
    shapes = Shapes(compute.text_slots, compute.visual_slots, rows, kind.config.decoder.context)
    return LoadedModel(mesh, module, preparer, shapes)


def encode_splits(session: Session, loaded: LoadedModel, programs: Programs, *, with_answers: bool) -> dict[str, Split]:
    """Prepare, encode and batch the samples of all splits, with progress; arguments and errors as of `build_split`."""
    preparer, shapes, processes, splits = loaded.preparer, loaded.shapes, session.processes, {}
    for name, samples in session.splits.items():
        with Progress(f"preparing {name}", len(own_samples(len(samples), programs)), "samples") as bar:
            splits[name] = build_split(samples, preparer, programs, shapes, with_answers, bar.advance, processes)
    return splits
