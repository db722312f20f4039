"""The start of a run: the model's folder, samples, the journal of the run's work, and the model on its mesh."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlens_jax.checkpoints.checkpoint import kind_in, load_model, model_hash
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.config import RunConfig
from rlens_jax.console import Progress, say
from rlens_jax.data.splits import asked_samples, load_splits, samples_hash, with_own
from rlens_jax.engine.choices import described, dtype_on, mesh_of, with_dtype
from rlens_jax.engine.inputs import Split, encode_split
from rlens_jax.engine.preparing import PreparedSplit, prepare
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.shapes import Block, Dealt, Shapes, blocks_of, choose_shapes, dealt_rows, row_padding, useful_rows
from rlens_jax.engine.sizes import chosen_batch_size
from rlens_jax.families.registry import ModelKind
from rlens_jax.hosts.processes import Processes
from rlens_jax.layout import Bucket
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import Preparer
from rlens_jax.plans import STANDARD_LEVELS, Levels
from rlens_jax.search.journal import Journal
from rlens_jax.search.results import Buckets
from rlens_jax.sharding.model_axis import WORK


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint on disk: its description is read, its weights are not."""

    path: Path
    kind: ModelKind

    @classmethod
    def find(cls, model: str | Path) -> "ModelFolder":
        """The folder that `model` names; UserError unless it describes a supported model."""
        path = find_model(model)
        return cls(path, kind_in(path))

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
    """A run whose inputs are prepared and whose journal is open."""

    folder: ModelFolder
    config: RunConfig
    mesh: Mesh
    preparer: Preparer
    splits: Mapping[str, PreparedSplit]
    shapes: Shapes
    """Their batch size is as configured."""
    data_hash: str
    journal: Journal
    resumed: int
    """Outcomes in the journal that earlier processes made."""
    processes: Processes

    @property
    def buckets(self) -> Buckets:
        """The buckets, as they are recorded."""
        rows = tuple(bucket.size for bucket in self.shapes.rows)
        return Buckets(rows, self.shapes.images, row_padding(self.shapes, self.splits.values()))

    @property
    def num_samples(self) -> dict[str, int]:
        """Samples of each split."""
        return {name: len(split.samples) for name, split in self.splits.items()}

    def sizes(self, split: str) -> dict[str, int]:
        """Samples per dataset of a split."""
        return dict(Counter(sample.dataset for sample in self.splits[split].samples))

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: ModelFolder,
        config: RunConfig,
        processes: Processes,
        *,
        restart: bool = False,
        own: Mapping[str, tuple[int, ...]] | None = None,
        bare: bool = False,
    ) -> Iterator["Session"]:
        """Read and prepare the samples, choose buckets, and open the journal of a run; all processes agree on each.

        Args:
            restart: as of `open_log`.
            own: tokens of the dense model's answers to samples, by their ids.
            bare: prompts have no answers, and samples that have right answers and serve the curves are left out: the session
                asks for the dense model's own answers.

        Raises:
            UserError: a mesh that does not divide devices or model, unusable samples, or a journal that belongs to other inputs
                or settings.
        """
        output, kind, compute = config.folder, folder.kind, config.compute
        processes.check_shared(output)
        processes.agreed(lambda: Journal.check_free(output))
        mesh = mesh_of(compute, kind.config.decoder.sizes)
        preparer = processes.agreed(lambda: kind.preparer(folder.path))
        # A model that generates may reason before it answers; teacher forcing scores the bare answer.
        generates = config.search.objective == "generation"
        prompt = partial(kind.benchmark_prompt, step_by_step=generates and not bare)
        read = partial(load_splits, config.data, prompt, seed=config.seed)
        # The first process to need a dataset prepares it in the cache, which the processes may share.
        samples = processes.in_order(read, read)
        samples = asked_samples(samples, config) if bare else with_own(samples, config, own or {})
        data_hash, splits = samples_hash(samples), {}
        for name, members in samples.items():
            with Progress(f"preparing {name}", -(-len(members) // processes.count), "samples") as bar:
                longest = None if compute.text_slots is None else compute.text_slots[-1]
                share = partial(prepare, sharing=compute.sharing, most_text=longest)
                splits[name] = share(members, preparer, not generates, processes, bar.advance)
            say(f"{name}: {splits[name].described()}")
        shapes = processes.agreed(lambda: choose_shapes(compute, kind, list(splits.values())))
        given, config = config, with_dtype(config, jax.default_backend())
        say(described(given, config, shapes, list(splits.values())))
        settings = {"data_hash": data_hash, **config.deciding_settings(), "buckets": shapes.identity}
        identity = processes.agreed(lambda: folder.identity(settings))
        processes.check_same(identity)
        first, rest = partial(Journal.open, restart=restart), Journal.follow
        with processes.in_order(lambda: first(output, identity), lambda: rest(output, identity)) as journal:
            if journal.repaired:
                say(journal.repaired)
            resumed = journal.num_outcomes
            processes.check_same({"finished outcomes": resumed})
            yield cls(folder, config, mesh, preparer, splits, shapes, data_hash, journal, resumed, processes)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its mesh, the preparer of its inputs, and the place of every row."""

    mesh: Mesh
    module: VisionLanguageModel
    preparer: Preparer
    shapes: Shapes
    dealt: Mapping[str, Dealt]
    """By the name of the split."""
    blocks: Mapping[Bucket, Block]

    def programs(self, config: RunConfig, levels: Levels = STANDARD_LEVELS) -> Programs:
        """The programs of a search over this model, with plans of these levels."""
        ends, new_tokens = self.preparer.chat.stop_tokens, config.search.max_new_tokens
        return Programs(
            self.module, self.mesh, config.reduction, seed=config.seed, new_tokens=new_tokens, stop_tokens=ends, levels=levels
        )


def load(session: Session) -> LoadedModel:
    """Load the model on all devices; an open batch size becomes the largest useful one that fits into their memory.

    Raises:
        UserError: the batch size, or not one row, fits into memory, or the folder is not usable.
    """
    folder, config, mesh, shapes = session.folder, session.config, session.mesh, session.shapes
    rows = chosen_batch_size(config, folder.kind, mesh, shapes.largest, useful_rows(shapes))
    _, module = load_model(folder.path, jnp.dtype(dtype_on(mesh, config.compute)), mesh=mesh, ffn_path=config.compute.ffn_path)
    shapes = replace(shapes, batch_size=rows)
    dealt = {name: dealt_rows(prepared, shapes, mesh.shape[WORK]) for name, prepared in session.splits.items()}
    blocks = blocks_of([(session.splits[name], each) for name, each in dealt.items()], shapes, even=True)
    return LoadedModel(mesh, module, session.preparer, shapes, dealt, blocks)


def encode_split_of(session: Session, loaded: LoadedModel, programs: Programs, name: str) -> Split:
    """Encode the samples of a split, with progress; every process calls it."""
    prepared, dealt, processes = session.splits[name], loaded.dealt[name], session.processes
    with Progress(f"encoding {name}", len(prepared.image_sizes_of) // processes.count, "images") as bar:
        return encode_split(prepared, programs, loaded.shapes, dealt, loaded.blocks, processes, bar.advance)


def encode_splits(session: Session, loaded: LoadedModel, programs: Programs) -> dict[str, Split]:
    """Encode the samples of all splits."""
    return {name: encode_split_of(session, loaded, programs, name) for name in session.splits}
