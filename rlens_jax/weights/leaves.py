"""A model's parameters by dotted path: filled layer by layer when loading, read so when saving."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlens_jax.weights.table import Place


def shapes_of(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, of a real or an abstract model."""
    return {path: tuple(leaf.shape) for path, leaf in arrays_of(model).items()}


def arrays_of(model: nnx.Module) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """All parameters by dotted path; of an abstract model, their shapes and dtypes."""
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in leaves}


def read_place(arrays: Mapping[str, Any], place: Place) -> np.ndarray:
    """A parameter, or one layer of a stacked one, on the host."""
    leaf = arrays[place.path]
    return np.asarray(leaf if place.layer is None else leaf[place.layer])


def unstacked(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """One name for each layer of each stacked parameter: `decoder.layers.3.ffn_norm.scale` and where that is.

    A module called `layers` is a stack: its parameters have a leading layer axis.
    """
    names = {}
    for path, shape in shapes.items():
        before, stack, after = path.partition(".layers.")
        if not stack:
            names[path] = Place(path, None)
        else:
            for layer in range(shape[0]):
                names[f"{before}.layers.{layer}.{after}"] = Place(path, layer)
    return names


class Filler:
    """Fills an abstract model: a parameter is allocated at its first layer, handed to JAX at its last."""

    def __init__(self, abstract: nnx.Module):
        self.abstract = abstract
        self.leaves = arrays_of(abstract)
        self.done: dict[str, jax.Array] = {}
        self._open: dict[str, tuple[np.ndarray, int]] = {}

    def put(self, place: Place, array: np.ndarray) -> None:
        """Copies `array` to its place, rounded to the model's dtype."""
        leaf = self.leaves[place.path]
        if place.path not in self._open:
            times = 1 if place.layer is None else leaf.shape[0]
            self._open[place.path] = np.empty(leaf.shape, leaf.dtype), times
        buffer, left = self._open.pop(place.path)
        buffer[... if place.layer is None else place.layer] = array
        if left > 1:
            self._open[place.path] = buffer, left - 1
        else:
            self.done[place.path] = jnp.asarray(buffer)

    def model(self) -> nnx.Module:
        """The filled model.

        Raises:
            ValueError: a parameter was not filled.
        """
        if self.done.keys() != self.leaves.keys():
            raise ValueError(f"not filled: {sorted(self.leaves.keys() - self.done.keys())}")
        graph, state = nnx.split(self.abstract)
        flat = nnx.to_flat_state(state)
        filled = [(path, leaf.replace(self.done[".".join(map(str, path))])) for path, leaf in flat]
        return nnx.merge(graph, nnx.from_flat_state(filled))
