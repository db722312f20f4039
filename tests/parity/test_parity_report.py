"""The Markdown reports of `validate` show what bundles and model folders name as text."""

import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

from rlens_jax.parity.bundle import Case, Manifest
from rlens_jax.parity.comparison import CaseResult, Validation
from rlens_jax.parity.constants import ConstantDifference
from rlens_jax.parity.measures import LogitsDifference
from rlens_jax.parity.parity_report import validation_markdown
from rlens_jax.parity.parting import Parting
from rlens_jax.plans import Plan, Reduction
from tests.reporting.runs import HOSTILE


def validation(text: str) -> Validation:
    case = Case(text, Plan((1,), ()), Reduction(), {text: text})
    logits = LogitsDifference(3, 1.0, 1.0, 0.5, 0.1, 0.2)
    result = CaseResult(case, logits, {}, (), False, Parting(None, None, text))
    manifest = Manifest(Path("bundle"), text, "qwen2_vl", {text: text}, text, (case,), {}, {text: text})
    return Validation(text, "float32", 2, manifest, 1e-4, [ConstantDifference(text, 1, 2)], [result], {text: text})


def test_nothing_of_a_bundle_becomes_markup() -> None:
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    hostile, plain = (markdown.render(validation_markdown(validation(text))) for text in (HOSTILE, "x"))
    tags = re.compile(r"<(/?[a-z]+\d?)")
    assert tags.findall(hostile) == tags.findall(plain)
    assert html.unescape(hostile).count(" ".join(HOSTILE.split())) >= 10
