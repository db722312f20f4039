"""The base class of models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class BaseModel:
    INTERLEAVE = False

    def __init__(self) -> None:
        self.dump_image_func: Callable[[Any], list[str]] | None = None

    def use_custom_prompt(self, dataset):
        return False

    def build_prompt(self, line, dataset):
        raise NotImplementedError

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate_inner(self, message, dataset=None):
        raise NotImplementedError

    def generate(self, message: list[Mapping[str, str]], dataset=None):
        for part in message:
            assert (part["type"] == "text") != Path(part["value"]).is_file(), part
        return self.generate_inner(message, dataset)
