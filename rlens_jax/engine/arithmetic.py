"""The arithmetic of a traced program, loops included: XLA's own analysis counts the body of a loop once."""

import math
from collections.abc import Iterator
from typing import Any

_HIDING = ("pallas_call", "ffi_call", "ragged_dot", "dot_product_attention")
"""How the names of primitives begin whose arithmetic is not in the program."""


def fixed_flops(jaxpr: Any) -> int | None:
    """Multiplications and additions of the matrix products and convolutions of a `jax.core.Jaxpr`, by its shapes.

    Inside a `shard_map`, those of one shard. None if they depend on data, as in a loop that ends at a traced bound, or if a
    kernel hides them.
    """
    total = 0
    for equation in jaxpr.eqns:
        found = _of_equation(equation)
        if found is None:
            return None
        total += found
    return total


def _of_equation(equation: Any) -> int | None:
    name, params = equation.primitive.name, equation.params
    if name.startswith(_HIDING):
        return None
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, outputs = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
    inner = [fixed_flops(each) for each in _inside(params)]
    if None in inner:
        return None
    counts = [count for count in inner if count is not None]
    if name == "cond":
        return counts[0] if len(set(counts)) == 1 else None
    if name == "while" and any(counts):
        return None
    return int(params.get("length", 1)) * sum(counts) if name == "scan" else sum(counts)


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner
