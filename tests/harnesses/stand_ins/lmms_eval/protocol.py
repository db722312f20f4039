"""The messages of a request."""

from types import SimpleNamespace
from typing import Any


class ChatMessages:
    def __init__(self, messages: list[dict[str, Any]]):
        self.messages = [
            SimpleNamespace(role=message["role"], content=[SimpleNamespace(**part) for part in message["content"]])
            for message in messages
        ]
