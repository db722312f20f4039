"""Frozen dataclasses of arrays as JAX pytrees, with shapes checked at construction.

Tests check the annotated shapes of every call of a class (jaxtyping and beartype). JAX itself rebuilds pytrees from anything,
such as partitions, shapes, or arrays with a mapped axis. It therefore builds them without the constructor here.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is a pytree. Fields with metadata {"static": True} are part of its structure."""
    dataclass: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(dataclass)
    static = [field.name for field in fields if field.metadata.get("static")]
    leaves = [field.name for field in fields if field.name not in static]
    keys = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def flatten(tree: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(tree, name) for name in leaves], tuple(getattr(tree, name) for name in static)

    def flatten_with_keys(tree: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children, structure = flatten(tree)
        return list(zip(keys, children, strict=True)), structure

    def unflatten(structure: tuple[Any, ...], children: Iterable[Any]) -> Any:
        return unchecked(dataclass, **dict(zip(static, structure, strict=True)), **dict(zip(leaves, children, strict=True)))

    jax.tree_util.register_pytree_with_keys(dataclass, flatten_with_keys, unflatten, flatten)
    return dataclass


def unchecked(cls: type[T], **fields: Any) -> T:
    """An instance with anything in place of its arrays, for example a partition per field (a prefix of the tree)."""
    tree = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(tree, name, value)
    return tree
