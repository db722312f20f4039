"""YAML files of plain data are read; all else is refused in one line."""

from pathlib import Path

import pytest

from rlens_jax.errors import UserError
from rlens_jax.yaml_file import read_yaml


def test_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1\nreduction:\n  attention_range: 256\n  probe: random\nsplits: [a, b]\n")
    assert read_yaml(path) == {"seed": 1, "reduction": {"attention_range": 256, "probe": "random"}, "splits": ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[" * 10_000, "too deeply nested"),
        ("\n".join(" " * depth + "a:" for depth in range(500)), "too deeply nested"),
        ("a: &x [1]\nb: *x", "anchors and aliases are not supported"),
        ("seed: 1\nseed: 2", r"field 'seed' is given twice.*line 2"),
        ("a: {b: 1, b: 2}", "field 'b' is given twice"),
        ("seed: " + "9" * 5000, "not readable as YAML: Exceeds the limit"),
        ("day: 2026-13-45", "not readable as YAML: month must be"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? [1, 2]\n: 3\n? {a: 1}\n: 2", "unhashable key"),
        ("a: \0", "special characters are not allowed"),
        ("a: [1", "expected ',' or ']'"),
        ("# " + "x" * 300_000, "longer than the 262,144 bytes"),
    ],
)
def test_what_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
