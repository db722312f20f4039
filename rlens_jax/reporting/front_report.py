"""The files and texts of a joint search: plan.json, front.json, the Pareto plot, and its section of report.html."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from rlens_jax.files import json_text, replace_file
from rlens_jax.plan_file import PlanFile
from rlens_jax.plans import Plan, Reduction
from rlens_jax.reporting.page_parts import environment, plain_page
from rlens_jax.search.front import DOWN_SAMPLED, FRONT, Front, front_fields

PLAN = "plan.json"
_KINDS = {
    "dense": "dense model",
    "joint": "joint search",
    "attention": "attention alone",
    "ffn": "FFN alone",
    "both": "two separate rankings",
    "position": "last layers first",
    "random": "random order",
    DOWN_SAMPLED: "down-sampled images",
}


@dataclass(frozen=True)
class FrontRow:
    """A plan of the table, or the images of the dense model; times in seconds, None where not measured."""

    kind: str
    layers: str
    published: bool
    cost: float | None
    flops: float
    score: Mapping[str, float]
    loss: float
    bound: float
    reduced: float | None
    time_saved: float | None
    on_front: bool


def front_rows(fields: Mapping[str, Any]) -> list[FrontRow]:
    """The plans of a front.json, in its order."""
    rows = []
    for number, point in enumerate(fields["points"]):
        time = point["time"]
        dense, reduced = (median(time[side]) if time else None for side in ("dense", "reduced"))
        if point["kind"] == DOWN_SAMPLED:
            layers = f"images of {point['visual_tokens']:.0f} visual tokens"
        else:
            layers = Plan.from_fields(point["plan"]).label()
        rows.append(
            FrontRow(
                kind=_KINDS[point["kind"]],
                layers=layers,
                published=number == fields["published"],
                cost=point["cost"],
                flops=point["flops"],
                score=point["score"],
                loss=point["loss"],
                bound=point["loss_bound"],
                reduced=reduced,
                time_saved=None if dense is None or reduced is None else 1 - reduced / dense,
                on_front=point["on_front"],
            )
        )
    return rows


def front_section(fields: Mapping[str, Any]) -> Markup:
    """The section of an HTML report: the verdict, the plot and the table of all plans."""
    # Imported late: a run needs matplotlib at its end only, and importing it takes a second.
    from rlens_jax.reporting.front_plot import plot_front

    picture = base64.b64encode(plot_front(fields, "png")).decode()
    template = environment().get_template("front.html.jinja")
    return Markup(template.render(front=fields, rows=front_rows(fields), picture=picture))


def write_front(front: Front, folder: Path, *, page: bool = True) -> None:
    """Write plan.json, the plots and, with `page`, report.html; front.json comes last. UserError if a file cannot be written."""
    # Imported late: a run needs matplotlib at its end only, and importing it takes a second.
    from rlens_jax.reporting.front_plot import plot_front

    fields = front_fields(front)
    reduction = Reduction(**front.settings["reduction"])
    contents = {
        PLAN: json_text(PlanFile(front.plan, reduction, front.num_layers).document()).encode(),
        "front.png": plot_front(fields, "png"),
        "front.svg": plot_front(fields, "svg"),
    }
    if page:
        contents["report.html"] = _page(fields).encode()
    for name, content in {**contents, FRONT: json_text(fields).encode()}.items():
        replace_file(folder / name, content)


def front_summary(front: Front, folder: Path) -> str:
    """The published plan, what it saves and loses, and what it is compared with, for the terminal."""
    rows = front_rows(front_fields(front))
    samples = sum(front.samples.values())
    lines = [
        f"Best plan for {front.budget}, by measured {front.cost}:"
        if front.cost == "time"
        else f"Best plan for {front.budget}, by FLOPs:"
    ]
    lines += [f"  {front.plan.label()}", f"  {front.verdict}", ""]
    if front.largest_divergence is not None:
        lines[-1:] = [f"  largest KL(dense || plan) at one token of a validation answer: {front.largest_divergence:.3g} nats", ""]
    lines.append(f"On {samples} held-out samples about {front.images} images; time of the prefill against dense, in turns:")
    lines.append(f"  {'':<28}{'loss':>9}{'at most':>9}{'FLOPs left':>12}{'predicted':>11}{'time saved':>12}")
    for row in rows:
        saved = "-" if row.time_saved is None else _percent(row.time_saved)
        name = f"{'*' if row.published else ' '} {row.layers if row.kind == _KINDS[DOWN_SAMPLED] else row.kind}"
        cells = (
            f"{_percent(row.loss):>9}",
            f"{_percent(row.bound):>9}",
            f"{_percent(row.flops):>12}",
            f"{'-' if row.cost is None else _percent(row.cost):>11}",
        )
        lines.append(f"{name:<30}{''.join(cells)}{saved:>12}")
    lines += [
        f"  (* published; predicted: share of the dense {front.cost} that is left; both sides skip what no answer needs)",
        "",
        f"Plan: {folder / PLAN}; front: {folder / FRONT}, front.svg",
    ]
    return "\n".join(lines)


def _page(fields: Mapping[str, Any]) -> str:
    return plain_page(
        f"The best plan for {fields['budget']}",
        "The best plan under a budget",
        front_section(fields),
        model=fields["configuration"]["model"],
        num_layers=fields["num_layers"],
        device=fields["device"],
    )


def _percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0:.1f} %"
