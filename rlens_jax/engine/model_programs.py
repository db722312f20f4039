"""A model on a mesh as compiled programs.

Every program runs on a mesh. The rows of a batch are split into one block per work group. One CPU is a mesh of one group. The
vision tower is partitioned by XLA; the decoder runs inside one `shard_map` (`rlens_jax.sharding.model_axis`).
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from rlens_jax.checkpoints.leaves import axes_of
from rlens_jax.engine import profile
from rlens_jax.engine.arithmetic import fixed_flops
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.ops.attention import Kernel, suited_kernel
from rlens_jax.sharding.mesh import ParameterLayout, groups_of, put_rows, split_over
from rlens_jax.sharding.model_axis import MODEL, WORK

ROWS, EVERYWHERE = PartitionSpec(WORK), PartitionSpec()


class Program:
    """A jitted function of a model's parameters and other arrays, bound to the parameters."""

    def __init__(self, name: str, jitted: Any, leaves: list[Array | jax.ShapeDtypeStruct]):
        self.name = name
        self._jitted = jitted
        self._leaves = leaves
        self._ahead: dict[Hashable, Any] = {}
        """Executables that were compiled ahead, by the shapes of their arguments."""
        self._traced: set[Hashable] = set()
        """Shapes that are compiled ahead, or are about to be."""
        self._flops: dict[Hashable, int | None] = {}
        """By the shapes of the arguments; filled while a profile is taken."""

    def __call__(self, *arguments: Any) -> Any:
        run = self._ahead.get(_shapes(arguments), self._jitted) if self._ahead else self._jitted
        return profile.run(self.name, arguments, lambda: run(self._leaves, *arguments), lambda: self._fixed_flops(*arguments))

    def _fixed_flops(self, *arguments: Any) -> int | None:
        shapes = _shapes(arguments)
        if shapes not in self._flops:
            self._flops[shapes] = fixed_flops(self._jitted.trace(self._leaves, *arguments).jaxpr.jaxpr)
        return self._flops[shapes]

    def ahead(self, *arguments: Any) -> Callable[[], None]:
        """Trace for arguments as of `lower`, once; calling what is returned compiles, and later runs use the result.

        Arguments of later runs must lie on the devices as these do.
        """
        shapes = _shapes(arguments)
        if shapes in self._traced:
            return lambda: None
        lowered = self.lower(*arguments)
        self._traced.add(shapes)

        def compile_it() -> None:
            self._ahead[shapes] = lowered.compile()

        return compile_it

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """The program, traced for arguments, of which only shape, dtype and sharding count; nothing runs."""
        return self._jitted.lower(self._leaves, *arguments)


def _shapes(arguments: tuple[Any, ...]) -> Hashable:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


class ModelPrograms:
    """A model on a mesh, its vision tower as a program, and `program` to make others.

    The parameters are flattened once and passed as plain arrays.

    Args:
        model: a family's module with `vision` and `decoder`, laid out on `mesh` (or abstract, to be lowered only).
        mesh: the devices.
    """

    def __init__(self, model: VisionLanguageModel, mesh: Mesh):
        self._graph, state = nnx.split(model)
        self._variables = nnx.to_flat_state(state)
        self.names = [".".join(map(str, path)) for path, _ in self._variables]
        self.leaves = [variable.get_value() for _, variable in self._variables]
        layout = ParameterLayout(mesh, axes_of(model))
        self._specs = [layout.spec(name, leaf.shape) for name, leaf in zip(self.names, self.leaves, strict=True)]
        self.config = model.decoder.config
        self.dtype = model.decoder.embedding.get_value().dtype
        self.mesh = mesh
        self.kernel: Kernel = suited_kernel(mesh.devices.flat[0], self.dtype, self.config.head_dim)
        """The attention kernel of a prefill."""
        self.traces: Counter[str] = Counter()
        """How often each program was traced: once per bucket."""
        self._made: dict[Hashable, Program] = {}
        # A tower may go image by image, so each group takes its own images. XLA cuts the tower along `model`.
        self.encode_program = self.program("encode", _encode, (ROWS,), ROWS, cut=False)
        self._marked_encode = self.program("encode", _encode_marked, (ROWS,), ROWS, cut=False)

    @property
    def groups(self) -> int:
        """Work groups, W."""
        return self.mesh.shape[WORK]

    @property
    def own_groups(self) -> list[int]:
        """The work groups of this process."""
        return groups_of(self.mesh, jax.process_index())

    def encode(self, *arrays: np.ndarray, marked: bool = False) -> Float[Array, "I Z visual_width"]:
        """Visual tokens of a batch of prepared images of one bucket; each process gives the images of its groups.

        `marked` puts the marks of each token behind it (`families.tower_marks`), all in float32.
        """
        return (self._marked_encode if marked else self.encode_program)(put_rows(arrays, self.mesh))

    def put(self, rows: Float[np.ndarray, "rows P visual_width"]) -> Float[Array, "B P visual_width"]:
        """Rows of this process's groups, on their devices."""
        return put_rows(rows, self.mesh)

    def program(
        self, name: str, function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any, *, cut: bool = True
    ) -> Program:
        """Compile `function(model, *arguments)` for the rows of each group.

        Args:
            name: counts its traces.
            function: gets the model and the rows of one group.
            in_specs: how the arguments after the model lie on the mesh.
            out_specs: how the results lie on it.
            cut: the function gets shards of the model; else the whole model, which XLA cuts.
        """

        def counted(leaves: list[Array], *arguments: Any) -> Any:
            self.traces[name] += 1
            return function(self._model(leaves), *arguments)

        counted.__name__ = name  # its compilations are reported under this name
        model_specs = self._specs if cut else EVERYWHERE
        axes = (WORK, MODEL) if cut else (WORK,)
        jitted = jax.jit(split_over(counted, self.mesh, axes, (model_specs, *in_specs), out_specs))
        return Program(name, jitted, self.leaves)

    def once(self, key: Hashable, make: Callable[[], Program]) -> Program:
        """The program of a key, which `make` returns when it is first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def model(self) -> VisionLanguageModel:
        """The whole model, as laid out on the mesh."""
        return self._model(self.leaves)

    def _model(self, leaves: list[Array]) -> VisionLanguageModel:
        filled = [(path, variable.replace(leaf)) for (path, variable), leaf in zip(self._variables, leaves, strict=True)]
        return nnx.merge(self._graph, nnx.from_flat_state(filled))


def _encode(model: VisionLanguageModel, arrays: tuple[Array, ...]) -> Array:
    return model.vision(*arrays)


def _encode_marked(model: VisionLanguageModel, arrays: tuple[Array, ...]) -> Array:
    vision: Any = model.vision  # of a family whose towers have marks
    return vision.marked(*arrays)
