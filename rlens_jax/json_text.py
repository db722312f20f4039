"""How this project writes JSON results: indented, strictly JSON (NaN and infinities are errors), with a line end."""

import json
from collections.abc import Mapping
from typing import Any


def json_text(value: Mapping[str, Any]) -> str:
    """The text of a file. ValueError where a number is not finite."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
