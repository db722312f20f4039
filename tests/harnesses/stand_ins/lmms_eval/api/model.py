"""The base class of models."""

import abc
from typing import Any


class lmms(abc.ABC):  # noqa: N801  (its name)
    is_simple: bool = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        given = dict(item.split("=", 1) for item in arg_string.split(",") if item)
        given = {name: int(text) if text.isnumeric() else text for name, text in given.items()}
        return cls(**given, **{name: value for name, value in (additional_config or {}).items() if value is not None})

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...
