"""The mesh (`work`, `model`) of a run, and the placement of parameters and batches on it (our decision).

Batches are split over `work`: each work group of devices has some of the rows and a copy of the model. The model is split over
`model`: heads, FFN units and vocabulary are sharded, and all else is replicated. A single device is a mesh of size 1 x 1.

Towers use the letters of decoders for heads (N) and FFN units (F).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from rlens_jax.errors import UserError
from rlens_jax.sharding.model_axis import MODEL, WORK


@dataclass(frozen=True)
class AxisRules:
    """Logical axis -> mesh axis that it is split over; axes without a rule are replicated."""

    mesh_axes: Mapping[str, str] = field(default_factory=lambda: {"B": WORK, "N": MODEL, "K": MODEL, "F": MODEL, "V": MODEL})

    def spec(self, axes: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """The partition of an array whose last axes are named by `axes`; an axis that does not divide is replicated."""
        names: list[str | None] = [None] * (len(shape) - len(axes))
        for letter, size in zip(axes, shape[len(names) :], strict=True):
            name = self.mesh_axes.get(letter)
            names.append(name if name is not None and size % mesh.shape[name] == 0 else None)
        return PartitionSpec(*names)


RULES = AxisRules()

FfnForm = Literal["rows", "halves"]
"""How FFN units are stored: one row [D] each, or for a TPU's kernel as two half rows [2, D / 2] (`rlens_jax.ops.ffn_tpu`)."""


@dataclass(frozen=True)
class ParameterLayout:
    """Placement of a model's parameters on a mesh."""

    mesh: Mesh
    axes: Mapping[str, str]
    """Axis letters of each parameter by dotted path, without a stack's leading layer axis."""
    units: Collection[str] = ()
    """Paths of the parameters whose rows are FFN units."""
    ffn_form: FfnForm = "rows"

    def shape(self, path: str, shape: Sequence[int]) -> tuple[int, ...]:
        """`shape` with the vocabulary padded to a multiple of the shards."""
        lead = len(shape) - len(self.axes[path])
        return tuple(
            padded(size, self.mesh.shape[MODEL]) if place >= lead and self.axes[path][place - lead] == "V" else size
            for place, size in enumerate(shape)
        )

    def held(self, path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """Shape and axis letters of a parameter as it is stored, from its published shape."""
        shape, axes = self.shape(path, shape), self.axes[path]
        if self.ffn_form == "rows" or path not in self.units:
            return shape, axes
        return (*shape[:-1], 2, shape[-1] // 2), f"{axes[:-1]}2{axes[-1]}"

    def spec(self, path: str, shape: Sequence[int]) -> PartitionSpec:
        """The partition of a parameter of this (padded) shape; the halves have the same one."""
        return RULES.spec(self.axes[path], shape, self.mesh)

    def sharding(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """The sharding of a parameter of this (padded) shape."""
        return NamedSharding(self.mesh, self.spec(path, shape))


def padded(size: int, shards: int) -> int:
    """The next multiple of `shards`."""
    return -(-size // shards) * shards


def one_kind(devices: Sequence[Any]) -> str:
    """The kind of the devices; UserError if there are several, because a program runs on one kind."""
    kinds = sorted({device.device_kind for device in devices})
    if len(kinds) > 1:
        advice = "select devices of one kind, such as by CUDA_VISIBLE_DEVICES"
        raise UserError(f"the devices are of different kinds ({', '.join(kinds)}), and a program runs on one kind; {advice}")
    return kinds[0]


def make_mesh(devices: Sequence[Any], model_shards: int) -> Mesh:
    """The mesh of these devices; UserError if they are of different kinds or `model_shards` does not divide them.

    A copy of the model lies on the devices of one host if `model_shards` divides their number, else on those of neighbouring
    hosts: links within a host are as fast as others, so this costs nothing, and each host has whole work groups. The groups are
    in the order of the hosts.
    """
    one_kind(devices)
    if len(devices) % model_shards:
        raise UserError(
            f"compute.model_shards = {model_shards} does not divide the {len(devices)} devices; "
            f"choose one of {', '.join(map(str, _divisors(len(devices))))}"
        )
    # jax.make_mesh lays a copy of four devices out as a line over two hosts of a TPU slice.
    by_host = sorted(devices, key=lambda device: device.process_index)
    grid = np.array(by_host).reshape(len(devices) // model_shards, model_shards)
    return Mesh(grid, (WORK, MODEL), axis_types=(AxisType.Auto,) * 2)


def check_fits(sizes: Mapping[str, int], model_shards: int) -> None:
    """Raise UserError unless a decoder's heads and FFN units (`sizes` of the axes N, K and F) split into `model_shards`."""
    wrong = []
    if sizes["N"] % model_shards:
        wrong.append(f"{sizes['N']} query heads")
    if sizes["F"] % model_shards:
        wrong.append(f"{sizes['F']} FFN units")
    if sizes["K"] % model_shards and model_shards % sizes["K"]:
        wrong.append(f"{sizes['K']} kv heads")
    if wrong:
        fitting = [n for n in _divisors(sizes["N"]) if not (sizes["F"] % n or (sizes["K"] % n and n % sizes["K"]))]
        raise UserError(
            f"compute.model_shards = {model_shards} does not divide the model's {' and '.join(wrong)}; "
            f"choose one of {', '.join(map(str, fitting))}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is the batch, or the work groups."""
    return NamedSharding(mesh, PartitionSpec(WORK))


def groups_of(mesh: Mesh, process: int) -> list[int]:
    """The work groups with devices of a process."""
    return [g for g, row in enumerate(mesh.devices) if any(d.process_index == process for d in row)]


def put_rows(arrays: Any, mesh: Mesh) -> Any:
    """Global arrays over all groups, from host arrays with the rows of this process's groups."""
    sharding, groups = rows_sharding(mesh), mesh.shape[WORK]
    local_groups = len(groups_of(mesh, jax.process_index()))

    def put(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        shape = (array.shape[0] // local_groups * groups, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(put, arrays)


def local_rows(array: jax.Array) -> np.ndarray:
    """The rows of this process's groups, in order, of an array that is split over `work`."""
    blocks = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])


def split_over(
    function: Callable[..., Any], mesh: Mesh, axes: Collection[str], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` on shards along `axes` (`jax.shard_map`); XLA partitions it along the other axes."""
    # JAX's check of replication rejects branches with different collectives.
    return jax.shard_map(function, mesh=mesh, axis_names=set(axes), in_specs=in_specs, out_specs=out_specs, check_vma=False)


@cache
def _taker(mesh: Mesh) -> Any:
    def take(arrays: Any, rows: Array) -> Any:
        mine = rows[jax.lax.axis_index(WORK)]
        return jax.tree.map(lambda x: x[mine], arrays)

    return jax.jit(split_over(take, mesh, (WORK,), (PartitionSpec(WORK), PartitionSpec()), PartitionSpec(WORK)))


def take_rows(arrays: Any, rows: Int[np.ndarray, "W n"], mesh: Mesh) -> Any:
    """The rows `rows[g]` of each group g, counted within the group, of arrays that are split over `work`; split like them."""
    return _taker(mesh)(arrays, everywhere(rows, mesh))


def everywhere(values: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every process has, on all devices."""
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, PartitionSpec()), lambda index: values[index])
