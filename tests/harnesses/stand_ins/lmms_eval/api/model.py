"""The base class of models."""

import abc
from typing import Any


class lmms(abc.ABC):  # noqa: N801  (its name)
    is_simple: bool = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...
