"""Damages to files, all drawn from one random generator: JSON values, raw bytes, and what stands in a file's place."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

BIG, HUGE_FLOAT, DEEP, HALF_PAIR, TWICE = "@@big@@", "@@1e400@@", "@@deep@@", "@@half@@", "@@twice@@"
"""Stand for texts that `json.dumps` does not write."""
_RAW = {
    f'"{BIG}"': "9" * 5000,
    f'"{HUGE_FLOAT}"': "1e400",
    f'"{DEEP}"': "[" * 3000 + "]" * 3000,
    f'"{HALF_PAIR}"': r'"what \ud83d"',
}
WRONG: tuple[Any, ...] = (
    *(float("nan"), float("inf"), -1, -0.5, 1e300, 10**30, 2**63, BIG, HUGE_FLOAT),
    *(
        [],
        [1, 2],
        [[]],
        {},
        {"a": 1},
        "",
        "x",
        "1e-99999999",
        "../x",
        "/etc/passwd",
        "a\0b",
        "x" * 5000,
        "<image>",
        "é\u0301\u202e",
    ),
    *(HALF_PAIR, DEEP),
)
"""Values that no field of ours takes, or hardly any."""
ODD: tuple[Any, ...] = (None, True, False, 0, 1, 7, 0.5, "1", "none")
"""Values that some fields take."""
IN_PLACE = ("missing", "empty", "folder", "fifo", "loop", "device", "locked name")


@dataclass(frozen=True)
class Damage:
    """What was done: a description, and for a replaced value of a JSON file its path and the new value."""

    text: str
    path: tuple[str | int, ...] | None = None
    value: Any = None

    @property
    def is_wrong_value(self) -> bool:
        """Whether a value was replaced by one that hardly any field takes."""
        return self.path is not None and any(self.value is wrong or self.value == wrong for wrong in WRONG)


def paths(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all items in nested JSON values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: list[tuple[str | int, ...]] = []
    for name, child in items:
        found += [(*prefix, name), *paths(child, (*prefix, name))]
    return found


def json_bytes(value: Any) -> bytes:
    """A JSON text with the raw texts in place of their signs."""
    text = json.dumps(value, ensure_ascii=False)
    for sign, raw in _RAW.items():
        text = text.replace(sign, raw)
    return text.replace(TWICE, "").encode("utf-8", "surrogatepass")


def damaged_json(rng: Random, value: Any) -> tuple[bytes, Damage]:
    """A JSON text with one value, field or part damaged."""
    value = json.loads(json.dumps(value))
    places = paths(value)
    kind = (
        rng.choice(["replace"] * 10 + ["odd"] * 3 + ["delete", "rename", "twice", "whole", "bytes", "bytes"])
        if places
        else "whole"
    )
    if kind == "whole":
        new = rng.choice((*WRONG, *ODD))
        return json_bytes(new), Damage(f"the whole file is {_short(new)}")
    if kind == "bytes":
        return damaged_bytes(rng, json_bytes(value))
    path = rng.choice(places)
    *parents, last = path
    holder = value
    for name in parents:
        holder = holder[name]
    if kind in ("replace", "odd"):
        new = rng.choice(WRONG if kind == "replace" else ODD)
        holder[last] = new
        return json_bytes(value), Damage(f"{path} is {_short(new)}", path, new)
    if kind == "delete" or not isinstance(holder, dict):
        del holder[last]
    elif kind == "rename":
        name = str(last)
        holder[name[:-1] + name[-1:] * 2] = holder.pop(last)
    else:
        holder[TWICE + str(last)] = rng.choice(ODD)
    return json_bytes(value), Damage(f"{kind} {path}")


def damaged_bytes(rng: Random, content: bytes) -> tuple[bytes, Damage]:
    """Bytes that are cut, changed, repeated or in another encoding."""
    kind = rng.choice(("cut", "flip", "flip", "insert", "nul", "utf16", "repeat", "invalid", "mark"))
    place = rng.randrange((len(content) if rng.random() < 0.6 else min(64, len(content))) + 1)
    if kind == "cut":
        content = content[:place]
    elif kind == "flip" and content:
        place = min(place, len(content) - 1)
        content = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    elif kind == "utf16":
        content = content.decode("latin-1").encode("utf-16")
    elif kind == "repeat":
        content += content
    elif kind == "mark":
        content = b"\xef\xbb\xbf" + content
    else:
        extra = {"insert": bytes(rng.randrange(256) for _ in range(9)), "nul": b"\0", "invalid": b"\xff\xfe"}.get(kind, b"")
        content = content[:place] + extra + content[place:]
    return content, Damage(f"bytes: {kind} at {place}")


def damage_file(rng: Random, path: Path, outside: Path) -> Damage:
    """Damage a file in place: its JSON or its bytes, or put something else there; `outside` is a folder not to be touched."""
    if rng.random() < 0.12:
        return put_in_place(path, rng.choice(IN_PLACE), outside)
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.85:
        content, damage = damaged_json(rng, json.loads(content))
    else:
        content, damage = damaged_bytes(rng, content)
    path.write_bytes(content)
    return Damage(f"{path.name}: {damage.text}", damage.path, damage.value)


def put_in_place(path: Path, kind: str, outside: Path) -> Damage:
    """Replace a file by what is none."""
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "locked name":
        path.symlink_to(outside / "nowhere")
    return Damage(f"{path.name}: {kind}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:50] + "..."
