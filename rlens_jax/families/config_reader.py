"""Strict reading of fields of a JSON file of a checkpoint: each value has the kind and the range that the code behind it needs.

A field of config.json that asks for an unsupported computation is an error; fields that cannot change an inference result are
ignored. A field that is left out has the default of the class that transformers, or the code of the checkpoint, reads the
file with: files that transformers saved again leave out what equals such a default.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rlens_jax.errors import UserError
from rlens_jax.files import quoted

MOST = 1 << 20
"""No size of a model is larger; counts of tokens may be."""
MOST_LAYERS = 1 << 10
MOST_CHANNELS = 1 << 4
"""Of an image, frames of a patch, or patches per side of a visual token."""
MOST_PIXELS = 1 << 13
"""Per side of an image or of a patch."""
MOST_TOKENS = 1 << 31
_MOST_NUMBER = 1e30
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class ConfigReader:
    """Reads fields of one JSON object; error messages name file and field.

    Args:
        fields: the object.
        where: the file and the place in it, the beginning of every error.
        defaults: values of fields that are left out. A field that is null is not left out.
    """

    def __init__(self, fields: Mapping[str, Any], where: str, defaults: Mapping[str, Any] = _NOTHING):
        self.fields = fields
        self.where = where
        self.defaults = defaults

    def number(
        self, name: str, *aliases: str, default: float | None = None, null: float | None = None, most: float = _MOST_NUMBER
    ) -> float:
        """A positive number under `name` or one of its other spellings.

        Args:
            name: the field.
            aliases: other spellings; the first one that is there counts.
            default: the value of a field that is left out, before `defaults`.
            null: what null stands for; None if null is an error.
            most: the largest value.

        Raises:
            UserError: the field is missing or is no such number.
        """
        name, value = self._find((name, *aliases), default)
        if value is None and name not in self.fields:
            raise UserError(f"{self.where}: the field {name} is missing")
        if value is None and null is not None:
            return null
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(name, "must be a positive number", value)
        if value > most:
            raise self.error(name, f"must be at most {most:g}", value)
        return value

    def size(self, name: str, *aliases: str, default: int | None = None, null: int | None = None, most: int = MOST) -> int:
        """A positive whole number; arguments and errors as of `number`."""
        value = self.number(name, *aliases, default=default, null=null, most=most)
        if value != int(value):
            raise self.error(name, "must be a whole number", value)
        return int(value)

    def token(self, name: str, *aliases: str, vocabulary: int) -> int:
        """A token id of a vocabulary of this size; UserError as `number`."""
        name, value = self._find((name, *aliases), None)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
            raise self.error(name, f"must be a token id, from 0 to {vocabulary - 1}", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; `default` is for a field that has none in `defaults`."""
        value = self.fields.get(name, self.defaults.get(name, default))
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false", value)
        return value

    def require(self, name: str, *allowed: Any) -> Any:
        """The value of a field, which is one of the supported ones; the first is the default of a field that has none."""
        value = self.fields.get(name, self.defaults.get(name, allowed[0]))
        if not any(value == supported and isinstance(value, bool) == isinstance(supported, bool) for supported in allowed):
            supported = " or ".join(repr(choice) for choice in allowed)
            raise UserError(f"{self.where}: {name} = {quoted(value)} is not supported (only {supported})")
        return value

    def section(self, name: str, defaults: Mapping[str, Any] = _NOTHING) -> "ConfigReader":
        """A nested object, whose fields have these defaults."""
        value = self.fields.get(name)
        if not isinstance(value, Mapping):
            raise self.error(name, "must be an object", value)
        return ConfigReader(value, f"{self.where}: {name}", defaults)

    def _find(self, spellings: tuple[str, ...], default: Any) -> tuple[str, Any]:
        """The first spelling that is there, and its value; or else the first one with a default."""
        for values in (self.fields, {} if default is None else {spellings[0]: default}, self.defaults):
            for spelling in spellings:
                if spelling in values:
                    return spelling, values[spelling]
        return spellings[0], None

    def error(self, name: str, problem: str, value: Any) -> UserError:
        """The error for a field with an unsuitable value."""
        return UserError(f"{self.where}: {name} {problem}, not {quoted(value)}")
