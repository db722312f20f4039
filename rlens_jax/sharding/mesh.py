"""The mesh (`work`, `model`) of a run, and how parameters and batches lie on it.

Batches lie along `work`: each group of devices has its own rows and all of the model. The model lies along `model`: heads, FFN
units and vocabulary are cut, all else is whole on every device. One CPU is the mesh of size 1 x 1. (Our decision, design.md.)

Axis letters as in `rlens_jax.models.decoder`; towers use the same letters for heads (N) and FFN units (F).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlens_jax.errors import UserError
from rlens_jax.sharding.model_axis import MODEL, WORK


@dataclass(frozen=True)
class AxisRules:
    """Which mesh axis each logical axis lies along; axes without a rule are whole on every device."""

    mesh_axes: Mapping[str, str] = field(
        default_factory=lambda: {"B": WORK, "N": MODEL, "K": MODEL, "F": MODEL, "V": MODEL}
    )

    def spec(self, axes: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """The partition of an array whose last axes are named by `axes`; what does not divide is whole."""
        names: list[str | None] = [None] * (len(shape) - len(axes))
        for letter, size in zip(axes, shape[len(names) :], strict=True):
            name = self.mesh_axes.get(letter)
            names.append(name if name is not None and size % mesh.shape[name] == 0 else None)
        return PartitionSpec(*names)


RULES = AxisRules()


@dataclass(frozen=True)
class ParameterLayout:
    """Where a model's parameters lie on a mesh.

    Attributes:
        mesh: the devices.
        axes: the letters of each parameter by dotted path, without a stack's leading layer axis.
        halves: parameters whose last axis D is kept as two, [2, D / 2], for a kernel (`rlens_jax.ops.ffn_tpu`).
    """

    mesh: Mesh
    axes: Mapping[str, str]
    halves: Collection[str] = ()

    def shape(self, path: str, shape: Sequence[int]) -> tuple[int, ...]:
        """`shape` with the vocabulary padded so that every shard has as many rows."""
        lead = len(shape) - len(self.axes[path])
        return tuple(
            padded(size, self.mesh.shape[MODEL]) if place >= lead and self.axes[path][place - lead] == "V" else size
            for place, size in enumerate(shape)
        )

    def held(self, path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """The shape and axis letters with which a parameter of this shape is kept."""
        shape, axes = self.shape(path, shape), self.axes[path]
        if path not in self.halves:
            return shape, axes
        return (*shape[:-1], 2, shape[-1] // 2), f"{axes[:-1]}2{axes[-1]}"

    def spec(self, path: str, shape: Sequence[int]) -> PartitionSpec:
        """The partition of a parameter of this (padded) shape; it also is that of the halves."""
        return RULES.spec(self.axes[path], shape, self.mesh)

    def sharding(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """The sharding of a parameter of this (padded) shape."""
        return NamedSharding(self.mesh, self.spec(path, shape))


def padded(size: int, shards: int) -> int:
    """The next multiple of `shards`."""
    return -(-size // shards) * shards


def make_mesh(devices: Sequence[Any], model_shards: int) -> Mesh:
    """The mesh of some devices: consecutive ones, which are neighbours, share a copy of the model.

    Raises:
        UserError: `model_shards` does not divide the devices.
    """
    if len(devices) % model_shards:
        raise UserError(
            f"compute.model_shards = {model_shards} does not divide the {len(devices)} devices; "
            f"choose one of {', '.join(str(n) for n in _divisors(len(devices)))}"
        )
    shape = (len(devices) // model_shards, model_shards)
    return jax.make_mesh(shape, (WORK, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_fits(sizes: Mapping[str, int], model_shards: int) -> None:
    """Whether a decoder's heads and widths can be cut into `model_shards`.

    Args:
        sizes: by axis letter: N, K and F are looked at.
        model_shards: the size of the mesh's `model` axis.

    Raises:
        UserError: naming what does not divide.
    """
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
    """Of an array whose leading axis is the batch, or the work groups."""
    return NamedSharding(mesh, PartitionSpec(WORK))


def groups_of(mesh: Mesh, process: int) -> list[int]:
    """The work groups of which a process has devices."""
    return [g for g, row in enumerate(mesh.devices) if any(d.process_index == process for d in row)]


def put_rows(arrays: Any, mesh: Mesh) -> Any:
    """Host arrays with the rows of this process's groups, as global arrays over all groups."""
    sharding, groups = rows_sharding(mesh), mesh.shape[WORK]
    own = len(groups_of(mesh, jax.process_index()))

    def put(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        shape = (array.shape[0] // own * groups, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(put, arrays)


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows of this process's groups of an array that lies along `work`, in order."""
    blocks = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])


def split_over(
    function: Callable[..., Any], mesh: Mesh, axes: Collection[str], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` on shards along `axes` (`jax.shard_map`); XLA partitions it along the others."""
    # Replication is ours to know: its check does not follow branches that differ in their collectives.
    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names=set(axes),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )
