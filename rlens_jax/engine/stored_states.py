"""The states that enter each layer under a base plan, stored for some rows of a pool."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.engine.pools import Batch, Pool
from rlens_jax.engine.programs import Programs, States
from rlens_jax.plans import Plan
from rlens_jax.sharding.mesh import everywhere, split_over
from rlens_jax.sharding.model_axis import MODEL, WORK

Kept = tuple[Float[Array, "stored slots part"], Bool[Array, " stored"]]
"""The stored states that enter a layer, or deepstack features; `part` is a shard's part of the last axis."""


class StoredStates:
    """States of some rows of a pool, made when they are first needed and kept while the base changes in later layers only.

    States are those that *enter* a layer, so behind the deepstack feature of the layer before. The features are stored, too.

    All are cut over the mesh's `model` axis along D, if it divides D.

    Args:
        programs: make the states.
        pool: whose rows.
        rows: the rows of each group that are stored.
    """

    def __init__(self, programs: Programs, pool: Pool, rows: Int[np.ndarray, "W n"]):
        self.rows = rows
        self._programs = programs
        self._place = np.full(pool.samples.shape[:2], -1, np.int32)
        np.put_along_axis(self._place, rows, np.arange(rows.shape[1], dtype=np.int32)[None], axis=1)
        self._shape = rows.size, pool.bucket.slots, programs.config.width
        self._plan = Plan()
        self._held = np.zeros(rows.shape, np.int32)
        """How many layers' entering states are valid, for each row."""
        self._layers: list[Kept] = []
        self._features: Kept | None = None

    def entering(self, batch: Batch, layer: int, plan: Plan) -> States:
        """The states of a batch that enter `layer` under `plan`."""
        programs, places = self._programs, np.take_along_axis(self._place, batch.rows, axis=1)
        if (difference := self._plan.lowest_difference(plan)) is not None:
            np.minimum(self._held, difference + 1, out=self._held)
            self._plan = plan
        known = np.take_along_axis(self._held, places, axis=1)
        held = int(known.min())
        if held > layer:
            return self._take(layer, places)
        if held:
            states = self._take(held - 1, places)
        else:
            states = programs.embed(batch.inputs.text_ids, batch.visual)
            self._put(0, places, states)
            self._put_features(places, states)
        for first in range(max(held, 1) - 1, layer):
            states = programs.layers(states, batch.inputs, plan, first, first + 1)
            self._put(first + 1, places, states)
        np.put_along_axis(self._held, places, np.maximum(known, layer + 1), axis=1)
        return states

    def _take(self, layer: int, places: np.ndarray) -> States:
        mesh = self._programs.mesh
        take, where = _programs(mesh, self._cut)[1], everywhere(places, mesh)
        x, scored = take(self._layers[layer], where)
        return States(x, scored, None if self._features is None else take(self._features, where)[0])

    def _put(self, layer: int, places: np.ndarray, states: States) -> None:
        mesh = self._programs.mesh
        make, _, put = _programs(mesh, self._cut)
        if layer == len(self._layers):
            self._layers.append(make(self._shape, self._programs.dtype))
        self._layers[layer] = put(self._layers[layer], everywhere(places, mesh), (states.x, states.scored))

    def _put_features(self, places: np.ndarray, states: States) -> None:
        if states.features is None:
            return
        mesh = self._programs.mesh
        make, _, put = _programs(mesh, self._cut)
        if self._features is None:
            self._features = make((self._shape[0], *states.features.shape[1:]), self._programs.dtype)
        self._features = put(self._features, everywhere(places, mesh), (states.features, states.scored))

    @property
    def _cut(self) -> bool:
        return self._shape[2] % self._programs.mesh.shape[MODEL] == 0


def state_bytes(programs: Programs, pool: Pool) -> int:
    """Memory of a row's base states on a device, with deepstack features."""
    shards, config = programs.mesh.shape[MODEL], programs.config
    width = config.width // shards if config.width % shards == 0 else config.width
    return (pool.bucket.slots * config.num_layers + pool.bucket.visual * config.deepstack) * width * programs.dtype.itemsize


@cache
def _programs(mesh: Mesh, cut: bool) -> Any:
    """Programs that make stored states of zeros, take rows of them, and put rows into them."""
    rows = PartitionSpec(WORK)
    stored = PartitionSpec(WORK, None, MODEL if cut else None), rows

    def make(shape: tuple[int, int, int], dtype: Any) -> Kept:
        return jnp.zeros(shape, dtype), jnp.zeros(shape[0], bool)

    def take(kept: Kept, places: Array) -> tuple[Array, Array]:
        mine = places[jax.lax.axis_index(WORK)]
        x, scored = (part[mine] for part in kept)
        return jax.lax.all_gather(x, MODEL, axis=2, tiled=True) if cut else x, scored

    def put(kept: Kept, places: Array, new: tuple[Array, Array]) -> Kept:
        mine, (x, scored) = places[jax.lax.axis_index(WORK)], new
        if cut:
            width = kept[0].shape[2]
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(MODEL) * width, width, axis=2)
        return kept[0].at[mine].set(x), kept[1].at[mine].set(scored)

    split = partial(split_over, mesh=mesh, axes=(WORK, MODEL))
    shardings = tuple(NamedSharding(mesh, spec) for spec in stored)
    return (
        jax.jit(make, static_argnums=(0, 1), out_shardings=shardings),
        jax.jit(split(take, in_specs=(stored, PartitionSpec()), out_specs=(rows, rows))),
        jax.jit(split(put, in_specs=(stored, PartitionSpec(), (rows, rows)), out_specs=stored), donate_argnums=0),
    )
