"""Parameters of a model by dotted path: filled layer by layer when a model is loaded, and read so when it is saved."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlens_jax.config import FfnPath
from rlens_jax.families.table import Place
from rlens_jax.models.decoder import FFN
from rlens_jax.models.layers import UnitRows
from rlens_jax.ops.ffn_paths import ways_on
from rlens_jax.ops.ffn_tpu import suited_form
from rlens_jax.sharding.mesh import ParameterLayout, make_mesh, one_kind
from rlens_jax.sharding.model_axis import MODEL

Item = TypeVar("Item")
Model = TypeVar("Model", bound=nnx.Module)

HOST_BYTES = 1 << 24
"""Max bytes of a stack that is joined on the host."""
TOGETHER_BYTES = 1 << 28
"""Max bytes of small layers that are read or written together: a call to Orbax takes as long as 100 MB."""


def shapes_of(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a real or an abstract model."""
    return {path: tuple(leaf.shape) for path, leaf in arrays_of(model).items()}


def arrays_of(model: nnx.Module) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """All parameters by dotted path; for an abstract model, their shapes and dtypes."""
    return {path: leaf.get_value() for path, leaf in _variables(model, nnx.Param).items()}


def axes_of(model: nnx.Module) -> dict[str, str]:
    """The axis letters of all parameters by dotted path, without a stack's layer axis; "" where none are declared."""
    return {path: leaf.get_metadata().get("axes", "") for path, leaf in _variables(model, nnx.Param).items()}


def _variables(model: nnx.Module, kind: type[nnx.Variable]) -> dict[str, nnx.Variable]:
    """The variables of a kind by dotted path."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model, kind))}


def layout_of(model: nnx.Module, mesh: Mesh, ffn_path: FfnPath = "auto") -> ParameterLayout:
    """How a model's parameters lie on a mesh, with FFN units in the form that its reduced layers read.

    Raises:
        UserError: the path is the kernel, which cannot read such units on such devices.
    """
    units = {path: leaf.get_value() for path, leaf in _variables(model, UnitRows).items()}
    kind, shards, forms = one_kind(list(mesh.devices.flat)), mesh.shape[MODEL], set()
    for leaf in units.values():
        forms.add(suited_form(leaf.shape[1] // shards, leaf.shape[2], leaf.dtype, kind, ffn_path))
    return ParameterLayout(mesh, axes_of(model), units.keys(), "halves" if forms == {"halves"} else "rows")


def set_ffn_form(model: nnx.Module, layout: ParameterLayout, ffn_path: FfnPath = "auto") -> None:
    """Records in the model's FFNs how their units are stored, and how visual tokens can go through some of them."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, FFN):
            module.form = layout.ffn_form
            dtype = module.gate_proj.kernel.get_value().dtype
            module.ways = ways_on(layout.mesh.devices.flat[0], layout.ffn_form, dtype, ffn_path)


def place(model: Model, mesh: Mesh, ffn_path: FfnPath = "auto") -> Model:
    """A model created in memory, with its parameters laid out on a mesh as `load_model` does."""
    filler = Filler(nnx.eval_shape(lambda: model), mesh, ffn_path)
    arrays = arrays_of(model)
    for target in unstacked(shapes_of(model)).values():
        filler.put(target, filler.held(target, read_place(arrays, target)))
    return filler.model()


def read_place(arrays: Mapping[str, Any], place: Place) -> np.ndarray:
    """A parameter, or one layer of a stacked parameter, on the host."""
    leaf = arrays[place.path]
    return np.asarray(leaf if place.layer is None else leaf[place.layer])


def leaf_name(place: Place) -> str:
    """The name of a place, such as `decoder.layers.3.ffn_norm.scale`.

    Parameters of a module named `layers` are stacked: they have a leading layer axis.
    """
    if place.layer is None:
        return place.path
    before, _, after = place.path.partition(".layers.")
    return f"{before}.layers.{place.layer}.{after}"


def unstacked(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """All places of a model by `leaf_name`."""
    places = [
        Place(path, layer) for path, shape in shapes.items() for layer in (range(shape[0]) if ".layers." in path else [None])
    ]
    return {leaf_name(place): place for place in places}


def by_layer(items: Iterable[Item], name: Callable[[Item], str], num_bytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items that are read or written together: those of a layer, or of several small layers up to `TOGETHER_BYTES`.

    `name` gives a `leaf_name` of an item. An item outside all layers counts as a layer.
    """

    def layer(item: Item) -> str:
        return re.match(r".*?\.layers\.\d+\.|.*", name(item))[0]  # type: ignore[index]  # matches everything

    joined: list[Item] = []
    size = 0
    for _, members in groupby(sorted(items, key=layer), layer):
        group = list(members)
        more = sum(map(num_bytes, group))
        if joined and size + more > TOGETHER_BYTES:
            yield joined
            joined, size = [], 0
        joined, size = joined + group, size + more
    if joined:
        yield joined


class Filler(Generic[Model]):
    """Fills an abstract model on its devices.

    A stack is allocated when its first layer arrives, and written in place. Each shape of a stack is compiled for that, so a
    small stack is joined on the host instead.

    Args:
        abstract: the model, with shapes and dtypes in place of arrays.
        mesh: the devices; None is the first device.
        ffn_path: how reduced layers compute visual tokens.

    Raises:
        UserError: as `layout_of`.
    """

    def __init__(self, abstract: Model, mesh: Mesh | None = None, ffn_path: FfnPath = "auto"):
        self.abstract, self._ffn_path = abstract, ffn_path
        self.leaves = arrays_of(abstract)
        self._layout = layout_of(abstract, mesh or make_mesh(jax.devices()[:1], 1), ffn_path)
        self._filled: dict[str, jax.Array] = {}
        self._open: dict[str, int] = {}
        """Number of missing layers of each stack."""
        self._joining: dict[str, dict[int, np.ndarray]] = {}
        """The layers so far of small stacks."""

    def target(self, place: Place) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of the array for a place; the vocabulary is padded to fill its shards."""
        leaf = self.leaves[place.path]
        shape = self._layout.shape(place.path, leaf.shape)
        sharding = self._layout.sharding(place.path, shape)
        if place.layer is None:
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(shape[1:], leaf.dtype, sharding=sharding)

    def held(self, place: Place, array: np.ndarray) -> jax.Array:
        """A host array, equal on all processes, on the devices as `target` describes; each process copies its own shards."""
        target = self.target(place)
        array = array.astype(target.dtype, order="C")
        if array.shape != target.shape:
            padding = [(0, padded - size) for padded, size in zip(target.shape, array.shape, strict=True)]
            array = np.pad(array, padding)
        return jax.make_array_from_callback(target.shape, target.sharding, lambda index: array[index])

    def put(self, place: Place, array: jax.Array) -> jax.Array:
        """Put an array of the shape, dtype and sharding of `target` in its place; returns whether it is all finite."""
        path = place.path
        if place.layer is None:
            self._filled[path], self._open[path] = array, 0
            return jnp.asarray(np.isfinite(array).all()) if _is_small(array, 1) else _all_finite(array)
        shape = self._layout.shape(path, self.leaves[path].shape)
        sharding = self._layout.sharding(path, shape)
        held, _ = self._layout.held(path, shape)
        missing = self._open.get(path, shape[0])
        if _is_small(array, shape[0]):
            layer = self._joining.setdefault(path, {})[place.layer] = np.asarray(array)
            self._open[path] = missing - 1
            if missing == 1:
                layers = self._joining.pop(path)
                joined = np.stack([layers[number] for number in range(shape[0])]).reshape(held)
                self._filled[path] = jax.device_put(joined, sharding)
            return jnp.asarray(np.isfinite(layer).all())
        if path not in self._open:
            self._filled[path], self._open[path] = _allocate(held, array.dtype, sharding), shape[0]
        stack = self._filled[path]
        self._filled[path], finite = _write(stack, array, jnp.int32(place.layer), stack.sharding)
        self._open[path] -= 1
        return finite

    def model(self) -> Model:
        """The filled model. ValueError if a parameter was not filled."""
        lacking = [path for path in self.leaves if self._open.get(path) != 0]
        if lacking:
            raise ValueError(f"not filled: {sorted(lacking)}")
        graph, state = nnx.split(self.abstract)
        filled = []
        for path, leaf in nnx.to_flat_state(state):
            name = ".".join(map(str, path))
            _, axes = self._layout.held(name, self.leaves[name].shape)
            filled.append((path, leaf.replace(self._filled[name], axes=axes)))
        model = nnx.merge(graph, nnx.from_flat_state(filled))
        set_ffn_form(model, self._layout, self._ffn_path)
        return model


def _is_small(array: jax.Array, layers: int) -> bool:
    """Whether so many arrays may be joined on the host: they are small, and this process has all of them."""
    return layers * array.nbytes <= HOST_BYTES and array.is_fully_addressable


@partial(jax.jit, static_argnums=(0, 1, 2))
def _allocate(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(stack: jax.Array, array: jax.Array, layer: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, jax.Array]:
    """Replace one layer of a stack in place, in the form of the stack; returns the stack and whether the layer is finite."""
    written = jax.lax.dynamic_update_index_in_dim(stack, array.reshape(stack.shape[1:]), layer, axis=0)
    return jax.lax.with_sharding_constraint(written, sharding), jnp.isfinite(array).all()


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
