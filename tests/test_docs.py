"""The documents quote the code as it is."""

import ast
import re
from pathlib import Path

from tests.test_structure import RANKING_RUN

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_architecture_quotes_the_forward_pass() -> None:
    source = (ROOT / "rlens_jax" / "models" / "forward.py").read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    first, last = functions["forward"].lineno, functions["feed"].end_lineno
    (quoted,) = re.findall(r"```python\n(.*?)```", ARCHITECTURE, re.DOTALL)
    assert quoted.splitlines() == source.splitlines()[first - 1 : last]


def test_architecture_lists_the_way_of_a_ranking_run() -> None:
    listed = re.findall(r"^- `(\S+\.py)`$", ARCHITECTURE, re.MULTILINE)
    assert listed == [name for name in RANKING_RUN if not name.endswith("__init__.py")]


def test_documents_name_files_that_exist() -> None:
    path = re.compile(r"(?<![\w/])(?:rlens_jax|docs|tests|benchmarks|configs)/[a-z0-9_/]+\.[a-z.]*[a-z]")
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {name for document in documents for name in path.findall(document.read_text(encoding="utf-8"))}
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
