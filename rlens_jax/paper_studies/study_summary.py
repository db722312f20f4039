"""What a person at the terminal sees of finished studies."""

from collections.abc import Sequence
from pathlib import Path

from rlens_jax.paper_studies.study import Bound, Finding, Series, Study


def summary(studies: Sequence[Study], folder: Path) -> str:
    """The numbers that each study was made for, or its points where it has none, and where the rest is."""
    lines = []
    for study in studies:
        lines.append(f"{study.name}: {study.question}")
        lines += [f"  {_finding(finding)}" for finding in study.findings]
        if not study.findings:
            lines.append(f"  {study.x_label}: held-out score in %")
            scale = 100 if study.x_scale == "percent" else 1
            lines += [f"  {_series(line, scale)}" for panel in study.panels for line in panel.series]
        lines += [f"  -> {folder / study.name}.json, .png, .svg", ""]
    return "\n".join(lines).rstrip()


def _finding(finding: Finding) -> str:
    text = f"{finding.statement}: {_shown(finding.value)}"
    if finding.low is None or finding.high is None:
        return text
    return f"{text} (95 %: {_shown(finding.low)} to {_shown(finding.high)})"


def _shown(bound: Bound) -> str:
    return bound if isinstance(bound, str) else f"{bound:.4g}"


def _series(series: Series, scale: int) -> str:
    points = "  ".join(f"{scale * point.x:.3g}: {100 * point.mean:.1f}" for point in series.points)
    return f"{series.name}: {points}"
