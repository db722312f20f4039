"""Shapes and bytes before anything is allocated: abstract models and batches, and the batch size that fits.

Lower-case names are plain counts; W work groups.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from rlens_jax.checkpoints.leaves import layout_of, set_ffn_form
from rlens_jax.config import ComputeConfig, FfnPath, RunConfig
from rlens_jax.console import say
from rlens_jax.engine.choices import dtype_on
from rlens_jax.engine.model_programs import Program
from rlens_jax.engine.programs import Programs, States
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket, TokenLayout
from rlens_jax.models.decoder import TracedPlan
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import ImageArrays, Places, PromptBatch
from rlens_jax.pytrees import unchecked
from rlens_jax.sharding.mesh import rows_sharding

ASSUMED_PLACES = Places(1, 16)
"""Branches and answer tokens of a row whose data are not known (our assumption)."""
_EXHAUSTED = "RESOURCE_EXHAUSTED"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = re.compile(r"(?:[Uu]sed |required for HLO temporaries \()([\d.]+)([KMGT])")


@dataclass(frozen=True)
class Placed:
    """Makes abstract arrays whose leading axis is the batch or the work groups."""

    mesh: Mesh

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(self.mesh))


def abstract_model(kind: ModelKind, dtype: DTypeLike, mesh: Mesh, ffn_path: FfnPath = "auto") -> VisionLanguageModel:
    """The model as `load_model` lays it out, with shapes, dtypes and shardings in place of arrays."""
    model = kind.abstract(dtype)
    layout = layout_of(model, mesh, ffn_path)
    set_ffn_form(model, layout, ffn_path)
    graph, state = nnx.split(model)

    def placed(path: tuple[Any, ...], variable: Any) -> Any:
        name, leaf = ".".join(map(str, path)), variable.get_value()
        shape, axes = layout.held(name, leaf.shape)
        sharding = layout.sharding(name, layout.shape(name, leaf.shape))
        return variable.replace(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding), axes=axes)

    flat = [(path, placed(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def bytes_on_device(arrays: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def abstract_batch(bucket: Bucket, places: Places, rows: int, rope_axes: int, place: Placed) -> PromptBatch:
    """A batch of prompts in one bucket, `rows` over all work groups together."""

    def numbers(*shape: int) -> Any:
        return place((rows, *shape), jnp.int32)

    layout = unchecked(
        TokenLayout,
        text_position=numbers(bucket.text),
        visual_position=numbers(bucket.visual),
        text_branch=numbers(bucket.text),
        num_text=numbers(),
        num_visual=numbers(),
        seed=numbers(),
        max_branches=places.branches,
        leading_text=places.leading_text,
    )
    return unchecked(
        PromptBatch,
        text_ids=numbers(bucket.text),
        layout=layout,
        rope_positions=numbers(rope_axes, bucket.slots),
        **{name: numbers(places.branches) for name in ("samples", "prompt_end", "next_position", "next_rope")},
        **{name: numbers(places.answers) for name in ("answer_slots", "answer_targets", "answer_branch")},
    )


def abstract_images(arrays: ImageArrays, rows: int, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arrays of prepared images of one bucket, padded and stacked."""
    return tuple(Placed(mesh)((rows, *shape), dtype) for shape, dtype in arrays)


def decoder_arguments(
    programs: Programs, bucket: Bucket, rows: int, places: Places = ASSUMED_PLACES
) -> dict[Program, tuple[Any, ...]]:
    """The abstract arguments of each decoder program for batches of `rows` rows in all."""
    place, config = Placed(programs.mesh), programs.config
    batch = abstract_batch(bucket, places, rows, len(config.rope_sections), place)
    visual = place((rows, bucket.visual, config.visual_width), programs.dtype)
    features: Any = place((rows, bucket.visual, config.deepstack * config.width), programs.dtype) if config.deepstack else None
    x: Any = place((rows, bucket.slots, config.width), programs.dtype)
    scored: Any = place((rows,), jnp.bool_)
    same = NamedSharding(programs.mesh, PartitionSpec())
    indices = jax.ShapeDtypeStruct((config.num_layers,), jnp.int32, sharding=same)
    bound = jax.ShapeDtypeStruct((), jnp.int32, sharding=same)
    plan = unchecked(TracedPlan, attention=indices, ffn=indices, levels=programs.levels)
    return {
        programs.embed_program: (batch.text_ids, visual),
        programs.layers_program: (States(x, scored, features), batch, plan, bound, bound),
        programs.last_layer_program: (States(x, scored, features), batch),
        programs.outcome_program: (States(x, scored), batch),
        programs.generate_program: (visual, batch, plan),
    }


def fitting_batch_size(config: RunConfig, kind: ModelKind, mesh: Mesh, available: int, bucket: Bucket, most: int) -> int:
    """The largest number of rows per work group of a run that fits into a device's memory.

    The program with the largest temporaries, `layers` (or `generate`), is compiled for the largest bucket. Its memory, as XLA
    reports it, must fit in addition to the weights and the base states (our decision).

    Args:
        config: the run.
        kind: its model.
        mesh: the devices, real or of a slice to compile for.
        available: bytes of a device.
        bucket: the largest one.
        most: rows that are useful.

    Raises:
        UserError: not even one row fits.
    """
    compute, search = config.compute, config.search
    model = abstract_model(kind, dtype_on(mesh, compute), mesh, compute.ffn_path)
    weights = bytes_on_device(nnx.state(model))
    programs = Programs(model, mesh, config.reduction, seed=0, new_tokens=search.max_new_tokens, stop_tokens=(0,))
    program = programs.generate_program if search.objective == "generation" else programs.layers_program

    def needed(rows: int) -> int:
        arguments: Any = decoder_arguments(programs, bucket, rows * programs.groups)[program]
        held = weights + bytes_on_device(arguments)
        lowered = program.lower(*arguments)
        try:
            sizes: Any = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            # The TPU compiler refuses programs that cannot fit, and usually says how much they would need.
            if not is_out_of_memory(str(error)):
                raise
            return held + (bytes_refused(str(error)) or available)
        return held + sizes.temp_size_in_bytes + sizes.output_size_in_bytes + int(compute.state_memory_gb * 1e9)

    return max_rows(needed, available, most)


def chosen_batch_size(config: RunConfig, kind: ModelKind, mesh: Mesh, bucket: Bucket, useful: int) -> int:
    """The configured number of rows per work group, or as many as fit and are `useful`; arguments as of `fitting_batch_size`.

    A configured number is checked on accelerators, whose memory does not grow; a CPU takes it as it is.

    Raises:
        UserError: the configured number does not fit, with one that does; or not even one row fits.
    """
    given, device = config.compute.batch_size, mesh.devices.flat[0]
    if given and device.platform == "cpu":
        return given
    available = device_bytes(mesh)
    rows = fitting_batch_size(config, kind, mesh, available, bucket, given or useful)
    if not given:
        say(f"batch size: {rows}, {'more would not be faster' if rows == useful else 'as many as fit into memory'}")
    elif rows < given:
        raise UserError(
            f"compute.batch_size = {given} does not fit into the {available / 1e9:.1f} GB of a {device.device_kind}; "
            f"{rows} fits, and compute.batch_size = 0 chooses by itself"
        )
    return rows


def max_rows(needed: Callable[[int], int], available: int, most: int) -> int:
    """`most` rows, or half of them, a quarter, ...: the first number that fits.

    `most` usually fits, and the TPU compiler refuses at once what does not.

    Args:
        needed: bytes that the program for so many rows takes on a device; each call compiles one.
        available: bytes of a device.

    Raises:
        UserError: not even one row fits.
    """
    rows = most
    while (size := needed(rows)) > available:
        if rows == 1:
            raise UserError(
                f"one sample needs {size / 1e9:.1f} GB of a device's {available / 1e9:.1f} GB; raise "
                "compute.model_shards, lower the largest of compute.visual_slots, or compute in bfloat16"
            )
        rows //= 2
    return rows


def device_bytes(mesh: Mesh) -> int:
    """Memory of each device of this process; devices simulated on a CPU share the machine's."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in local]
    known = [limit for limit in limits if limit is not None]
    if known:
        return min(known)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(local)


def is_out_of_memory(message: str) -> bool:
    """Whether an error message of JAX says that memory ran out."""
    return _EXHAUSTED in message


def bytes_refused(message: str) -> int | None:
    """The memory need of a program that the TPU compiler refused, if its message says it."""
    match = _NEEDED.search(message)
    return round(float(match[1]) * _UNITS[match[2]]) if match else None


def memory_explained(compute: ComputeConfig) -> AbstractContextManager[None]:
    """As `out_of_memory_says`, with the fields that decide the memory need."""
    return out_of_memory_says(
        f"out of memory with compute.batch_size = {compute.batch_size} and compute.model_shards = {compute.model_shards}; "
        "lower compute.batch_size or compute.state_memory_gb, or raise compute.model_shards"
    )


@contextmanager
def out_of_memory_says(line: str) -> Iterator[None]:
    """Turn a device's running out of memory into one line.

    Raises:
        UserError: with `line`.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and not is_out_of_memory(str(error)):
            raise
        raise UserError(line) from None
