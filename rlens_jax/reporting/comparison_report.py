"""The files and texts of a comparison: comparison.json, .csv, .tex, .png, .svg, report.html, and the table for the terminal."""

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlens_jax.files import json_text, replace_file
from rlens_jax.reporting.page_parts import environment, interval_text, plain_page

COMPARISON = "comparison.json"
COST_NAMES = {
    "prefill": "prefill time",
    "first_token": "time to the first token",
    "multiply_adds": "multiply-adds",
    "kv_bytes": "KV cache",
}
"""The costs of a row."""
_MEMORY = {
    "device": "the device's own statistics",
    "analysis": "the memory analysis of the compiled prefill, parameters included",
    "resident": "the most resident memory of the process, which holds much besides",
    "resident since start": "the most resident memory of the process since its start, which holds much besides",
}
Row = Mapping[str, Any]
_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "method": lambda row: str(row["name"]),
    "score, % of dense": lambda row: _interval(row["score"]),
    "change": lambda row: _interval(row["change"], signed=True),
    "tokens kept": lambda row: f"{row['visual_tokens']['kept']:.1f}",
    "mean tokens": lambda row: f"{row['visual_tokens']['mean']:.1f}",
    "multiply-adds, %": lambda row: f"{100 * row['costs']['multiply_adds']:.1f}",
    "of them selection": lambda row: f"{100 * row['multiply_adds']['selection'] / sum(row['multiply_adds'].values()):.2f}",
    "KV cache, kB": lambda row: f"{row['kv_bytes'] / 1e3:,.0f}",
    "peak memory, MB": lambda row: f"{row['peak_memory']['bytes'] / 1e6:,.0f}",
    "prefill, ms": lambda row: _time(row["times"]["prefill"]),
    "%": lambda row: f"{100 * row['costs']['prefill']:.0f}",
    "first token, ms": lambda row: _time(row["times"]["first_token"]),
    "% ": lambda row: f"{100 * row['costs']['first_token']:.0f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "costs less and is surely as good": lambda row: _named(row["dominated_by"]["prefill"]),
}
"""The columns of the tables, and their cells."""
_SHORT = ("method", "score, % of dense", "tokens kept", "mean tokens", "multiply-adds, %", "prefill, ms", "%", "tokens/s")
"""Those of the terminal."""
_NAMED = 3
"""Most names in a cell."""
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "#": r"\#",
        "%": r"\%",
        "_": r"\_",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


def write_comparison(fields: Mapping[str, Any], folder: Path) -> None:
    """Write all files; comparison.json comes last. UserError if a file cannot be written."""
    # Imported late: a run needs matplotlib at its end only, and importing it takes a second.
    from rlens_jax.reporting.comparison_plot import plot_comparison

    png = plot_comparison(fields, "png")
    contents = {
        "comparison.csv": comparison_csv(fields).encode(),
        "comparison.tex": comparison_latex(fields).encode(),
        "comparison.png": png,
        "comparison.svg": plot_comparison(fields, "svg"),
        "report.html": _page(fields, png).encode(),
        COMPARISON: json_text(fields).encode(),
    }
    for name, content in contents.items():
        replace_file(folder / name, content)


def comparison_csv(fields: Mapping[str, Any]) -> str:
    """A row per method, with all single numbers of comparison.json under their dotted names."""
    rows = [_flat(row) for row in fields["methods"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{name}.") if name != "settings" else {}
        elif not isinstance(item, list):
            flat[f"{prefix}{name}"] = item
    return flat


def comparison_latex(fields: Mapping[str, Any]) -> str:
    """The table for a paper; it needs the package booktabs."""
    rows = [[_latex(cell) for cell in row] for row in _cells(fields["methods"])]
    lines = [
        f"% rlens_jax.compare, {_comment(fields['model']['path'])}, on {_comment(fields['device'])}, {fields['dtype']}",
        rf"\begin{{tabular}}{{l{'r' * (len(_COLUMNS) - 2)}}}",
        r"\toprule",
        " & ".join(map(_latex, [*_COLUMNS][:-1])) + r" \\",
        r"\midrule",
        *(" & ".join(row[:-1]) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex(text: str) -> str:
    return text.strip().translate(_LATEX)


def _comment(text: str) -> str:
    """A text that ends no line of a comment."""
    return " ".join(text.split())


def verdicts(fields: Mapping[str, Any]) -> list[str]:
    """Where methods lose to down-sampled images that cost no more, a sentence each."""
    rows = [row for row in fields["methods"][1:] if row["settings"]["image_share"] is None]
    if len(rows) == len(fields["methods"]) - 1:
        return ["Down-sampled images are not among the methods, so nothing is said about them here: add downsample@0.5."]
    sentences: list[str] = []
    ahead: list[str] = []
    alone: list[str] = []
    for row in rows:
        beside = {name: each for name, each in row["beside_down_sampled"].items() if each is not None}
        better = {name: each for name, each in beside.items() if each["score_above"]["value"] > 0}
        for rival in dict.fromkeys(each["name"] for each in better.values()):
            costs = [name for name, each in better.items() if each["name"] == rival]
            above = better[costs[0]]["score_above"]
            verb, no_more = "loses to" if above["low"] >= 0 else "may lose to", " and ".join(map(COST_NAMES.__getitem__, costs))
            points = _interval(above, signed=True)
            sentences.append(f"{row['name']} {verb} {rival}, whose score is {points} points above, for no more {no_more}.")
        if not better:
            (ahead if beside else alone).append(row["name"])
    if ahead:
        sentences.append(f"No down-sampled images that cost as little score higher than {', '.join(ahead)}.")
    if alone:
        sentences.append(f"No down-sampled images cost as little as {', '.join(alone)}.")
    return sentences


def not_as_asked(fields: Mapping[str, Any]) -> list[str]:
    """What answers are without, of all that the checkpoint and the profile ask for, a sentence each."""
    missing, profile = fields["model"]["not_applied"], fields["configuration"]["profile"]
    sentences = [f"Answers are greedy, without what the checkpoint asks for: {', '.join(missing)}."] if missing else []
    for name, each in fields["datasets"].items():
        if notes := each["asked"]["not_reproduced"]:
            sentences.append(f"{name} is not asked as in {profile}: {'; '.join(notes)}.")
    return sentences


def comparison_summary(fields: Mapping[str, Any], folder: Path) -> str:
    """The table for the terminal, the verdicts, what is not as asked, and where the files are."""
    rows = [[_COLUMNS[name](row) for name in _SHORT] for row in fields["methods"]]
    widths = [max(map(len, column)) for column in zip(_SHORT, *rows, strict=True)]
    lines = []
    for first, *others in [_SHORT, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    said = [*verdicts(fields), *not_as_asked(fields)]
    return "\n".join([*lines, "", *said, "", f"Report: {folder / 'report.html'}; numbers: {folder / COMPARISON}"])


def _page(fields: Mapping[str, Any], png: bytes) -> str:
    section = environment().get_template("comparison.html.jinja")
    methods, datasets = fields["methods"], fields["datasets"]
    units = [(name, methods[0]["datasets"][name]["unit"]) for name in datasets]
    scores = [(row["name"], [cell for name in datasets for cell in _score_cells(row["datasets"][name])]) for row in methods]
    rendered = section.render(
        picture=base64.b64encode(png).decode(),
        sentences=[*verdicts(fields), *not_as_asked(fields)],
        columns=list(_COLUMNS),
        rows=_cells(methods),
        fields=fields,
        questions=sum(each["questions"] for each in datasets.values()),
        memory="; ".join(sorted({_MEMORY[row["peak_memory"]["source"]] for row in methods})),
        datasets=units,
        scores=scores,
    )
    about = {"model": fields["model"]["path"], "num_layers": fields["model"]["num_layers"], "device": fields["device"]}
    return plain_page("Methods compared", "Methods in one table", Markup(rendered), **about)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    return [[cell(row) for cell in _COLUMNS.values()] for row in rows]


def _score_cells(scored: Row) -> tuple[str, str]:
    return interval_text(scored), interval_text(scored["change"], "+")


def _interval(interval: Mapping[str, float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    value, low, high = (f"{100 * interval[name]:{sign}.1f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _time(time: Row) -> str:
    seconds, (least, most) = time["seconds"], time["range"]
    return f"{1e3 * seconds:.1f} ({1e3 * least:.1f} to {1e3 * most:.1f})"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
