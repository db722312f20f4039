"""YAML files, read so strictly that each field has one plain value."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from rlens_jax.errors import UserError
from rlens_jax.files import read_text

_LARGEST = 256 * 1024
_DEEPEST = 16


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of plain data.

    Raises:
        UserError: the file cannot be read or is not valid YAML, it is larger than 256 KiB or nested too deeply, it has an anchor,
            or it names a field of a mapping twice.
    """
    text = read_text(path, _LARGEST)
    try:
        return yaml.load(text, _Strict)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # of an integer of thousands of digits, or a date that does not exist
        raise UserError(f"{path}: not readable as YAML: {error}") from error


class _Strict(yaml.SafeLoader):
    """Neither anchors, which can stand for gigabytes, nor deep nesting, nor a field that is given twice."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not supported", problem_mark=event.start_mark)
        if self._depth >= _DEEPEST:
            raise yaml.MarkedYAMLError(problem="too deeply nested", problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [(key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        known = set()
        for name, mark in names:
            if name in known:
                raise yaml.MarkedYAMLError(problem=f"field {name!r} is given twice", problem_mark=mark)
            known.add(name)
        return super().construct_mapping(node, deep)
