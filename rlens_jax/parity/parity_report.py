"""Reports on validations and on compared rankings: JSON (see the schemas in this folder), Markdown and terminal text."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlens_jax.files import json_text
from rlens_jax.parity.comparison import CaseResult, Validation
from rlens_jax.parity.rankings import RankingComparison
from rlens_jax.reporting.report_text import markdown_table, markdown_text

SCHEMA = "rlens-validation/1"
RANKINGS_SCHEMA = "rlens-ranking-comparison/1"


def validation_json(validation: Validation) -> str:
    """The JSON report, following validation.schema.json."""
    manifest = validation.manifest
    return json_text(
        {
            "schema": SCHEMA,
            "model": {
                "path": validation.model,
                "family": manifest.family,
                "num_layers": validation.num_layers,
                "dtype": validation.dtype,
            },
            "reference": {
                "bundle": manifest.folder.name,
                "model": manifest.model,
                "framework": dict(manifest.framework),
                "dtype": manifest.dtype,
                "further": dict(manifest.further),
            },
            "tolerance": validation.tolerance,
            "within_tolerance": validation.within_tolerance,
            "constants": [{"name": c.name, "model": c.ours, "reference": c.theirs} for c in validation.constants],
            "cases": [_case(result) for result in validation.results],
            "versions": dict(validation.versions),
        }
    )


def _case(result: CaseResult) -> dict[str, Any]:
    case = result.case
    return {
        "file": case.file,
        "plan": case.plan.fields(),
        "reduction": asdict(case.reduction),
        "further": dict(case.further),
        "logits": asdict(result.logits),
        "kept_units": [_finite({"layer": layer, **asdict(selection)}) for layer, selection in result.selections.items()],
        "hidden_states": [_finite(asdict(state)) for state in result.states],
        "within_tolerance": result.within_tolerance,
        "parting": None if result.parting is None else asdict(result.parting),
    }


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {name: None if value == float("inf") else value for name, value in fields.items()}


HEADINGS = ("case", "plan", "positions", "max abs", "max rel", "argmax equal", "mean KL", "units equal", "")


def _rows(validation: Validation) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for result in validation.results:
        logits = result.logits
        smallest = min((selection.smallest for selection in result.selections.values()), default=None)
        rows.append(
            (
                result.case.file,
                result.case.plan.label(),
                str(logits.num_positions),
                _number(logits.max_absolute),
                _number(logits.max_relative),
                f"{logits.argmax_agreement:.2%}",
                _number(logits.mean_kl),
                "-" if smallest is None else f">= {smallest:.1%}",
                "ok" if result.within_tolerance else "OUT OF TOLERANCE",
            )
        )
    return rows


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _verdict(validation: Validation) -> str:
    right = sum(result.within_tolerance for result in validation.results)
    verdict = f"{right} of {len(validation.results)} cases within the tolerance of {validation.tolerance:g}"
    return f"{verdict}; {len(validation.constants)} constants differ" if validation.constants else verdict


def _partings(validation: Validation) -> list[str]:
    """Constants first: they explain what follows."""
    constants = [f"{c.name}: {c.ours} in the model, {c.theirs} in the reference" for c in validation.constants]
    return constants + [f"{r.case.file}: {r.parting.text}" for r in validation.results if r.parting is not None]


def validation_text(validation: Validation) -> str:
    """Text for the terminal: a table of the cases, the first differences and the verdict."""
    table = [HEADINGS, *_rows(validation)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, *_partings(validation), _verdict(validation)])


def validation_markdown(validation: Validation) -> str:
    """The Markdown report."""
    manifest = validation.manifest
    framework = ", ".join(f"{name} {value}" for name, value in manifest.framework.items())
    parts = [
        f"# {markdown_text(validation.model)} against {markdown_text(manifest.model)}",
        f"{_verdict(validation)}: |ours - reference| <= {validation.tolerance:g} * max(1, largest reference logit), "
        "each operator on the reference's states within its own limit, and the same kept units except for near-ties.",
        f"Ours: {validation.dtype}. Reference: {markdown_text(framework)}, {markdown_text(manifest.dtype)}. Where the bundle has "
        "kept units, our model uses them too; the table shows the share of them that our probes choose.",
        markdown_table(HEADINGS, [tuple(map(markdown_text, row)) for row in _rows(validation)]),
    ]
    if partings := _partings(validation):
        parts.append("\n".join(f"- {markdown_text(line)}" for line in partings))
    further = {**manifest.further, **{f"{r.case.file}: {k}": v for r in validation.results for k, v in r.case.further.items()}}
    if further:
        lines = [f"- {markdown_text(f'{name}: {json.dumps(value)}')}" for name, value in further.items()]
        parts += ["Further fields of the bundle:", "\n".join(lines)]
    states = [(r.case.file, state) for r in validation.results for state in r.states]
    if states:
        rows = [
            (markdown_text(file), str(s.layer), s.after, _number(s.max_relative), _number(s.operator_relative))
            for file, s in states
        ]
        parts += ["## States", markdown_table(("case", "layer", "after", "max rel", "operator alone"), rows)]
    parts.append(markdown_text(", ".join(f"{name} {value}" for name, value in validation.versions.items())))
    return "\n\n".join(parts) + "\n"


def rankings_json(comparisons: Sequence[RankingComparison]) -> str:
    """The JSON report on two rankings, following rankings.schema.json."""
    return json_text({"schema": RANKINGS_SCHEMA, "comparisons": [asdict(comparison) for comparison in comparisons]})


def rankings_text(comparisons: Sequence[RankingComparison]) -> str:
    """Text for the terminal on two rankings."""
    return "\n\n".join("\n".join(_ranking_lines(comparison)) for comparison in comparisons)


def rankings_markdown(comparisons: Sequence[RankingComparison]) -> str:
    """The Markdown report on two rankings."""
    parts = ["# Two rankings"]
    for comparison in comparisons:
        rows = [
            (str(place), str(layer), _place(there))
            for place, (layer, there) in enumerate(zip(comparison.a, comparison.places_of_a_in_b, strict=True), 1)
        ]
        overlaps = [(str(k), f"{share:.0%}") for k, share in enumerate(comparison.overlaps, 1)]
        parts += [f"## {markdown_text(comparison.name)}"] if comparison.name else []
        parts.append(f"Kendall's tau: {comparison.kendall_tau:.3f}")
        parts.append(markdown_table(("place in A", "layer", "place in B"), rows))
        parts.append(markdown_table(("first k", "in common"), overlaps))
    return "\n\n".join(parts) + "\n"


def _ranking_lines(comparison: RankingComparison) -> list[str]:
    overlaps = " ".join(f"{k}:{share:.0%}" for k, share in enumerate(comparison.overlaps, 1))
    sides = (("A", comparison.a, "B", comparison.places_of_a_in_b), ("B", comparison.b, "A", comparison.places_of_b_in_a))
    return [
        *([comparison.name] if comparison.name else []),
        f"Kendall's tau {comparison.kendall_tau:.3f}",
        f"first k in common {overlaps}",
        *(
            f"{side}'s layers, place in {other}: "
            + " ".join(f"{layer}:{_place(place)}" for layer, place in zip(order, places, strict=True))
            for side, order, other, places in sides
        ),
    ]


def _place(place: int | None) -> str:
    return "-" if place is None else str(place)
