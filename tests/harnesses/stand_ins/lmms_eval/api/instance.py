"""A request."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Instance:
    args: tuple[Any, ...]
