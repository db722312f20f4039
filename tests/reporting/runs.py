"""Folders of synthetic finished runs, with examples that try to break the page."""

import dataclasses
from pathlib import Path

from PIL import Image

from rlens_jax.files import json_text, replace_file
from rlens_jax.plans import Plan
from rlens_jax.reporting.report_files import timing_fields
from rlens_jax.reporting.run_files import Answer, Example, write_examples
from rlens_jax.search.ranking_file import ranking_fields
from tests.reporting.synthetic import synthetic_results

ATTACK = "</p><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> & \"quotes\""
HOSTILE = (
    "`|` | a\n\n# <img src=x onerror=\"document.title='owned'\"> ![x](http://x/y.png) [x](javascript:alert(1)) "
    "$a^{b$ \\`{{ 7 * 7 }}</title></svg></style></script><script>document.title='owned'</script>\n---\n"
)
LONG_WORD = "antidisestablishmentarianism" * 6


def hostile_results():
    """Results in which every text that comes from data tries to become markup, of pages, plots or Markdown."""
    results = _renamed(synthetic_results(samples=20))
    config = dataclasses.replace(results.config, model=HOSTILE, data=dataclasses.replace(results.config.data, source=HOSTILE))
    timing = dataclasses.replace(results.timing, device=HOSTILE)
    return dataclasses.replace(results, config=config, timing=timing, versions={HOSTILE: HOSTILE}, model_hash=HOSTILE)


def _renamed(value):
    """Results with another name of a dataset, in all mappings."""
    if isinstance(value, dict):
        return {HOSTILE if name == "pages_read" else name: _renamed(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_renamed, value))
    if dataclasses.is_dataclass(value):
        fields = {field.name: _renamed(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **fields)
    return value


def examples(count=3, size=(900, 600)):
    image = Image.effect_noise(size, 80).convert("RGBA")
    questions = [ATTACK, LONG_WORD, "What is the total?"]
    answers = [Answer("1998", 1.0), Answer("", 0.0), Answer("<b>19</b>", 0.5)]
    return [
        Example(
            id=f"pages_read/test/{number:06}",
            dataset="pages_read",
            question=questions[number % 3],
            references=("1998", "nineteen ninety-eight"),
            images=(image,) * (1 + number % 3),
            dense=Answer("1998", 1.0),
            reduced=answers[number % 3],
        )
        for number in range(count)
    ]


def write_run(folder, results=None, kept=None):
    """Write the files that a report reads to a new folder; `kept` are its examples, if any."""
    results = results or synthetic_results(samples=20)
    folder.mkdir()
    if kept:
        plan = Plan(attention=(10, 11), ffn=(11,))
        write_examples(folder, kept, plan=plan, model_hash=results.model_hash, data_hash=results.data_hash)
    replace_file(Path(folder) / "timing.json", json_text(timing_fields(results.timing)).encode())
    replace_file(Path(folder) / "ranking.json", json_text(ranking_fields(results)).encode())
    return folder
