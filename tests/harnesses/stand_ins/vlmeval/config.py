"""The models by name: callables that make them."""

from collections.abc import Callable
from typing import Any

supported_VLM: dict[str, Callable[[], Any]] = {}  # noqa: N816  (its name)
