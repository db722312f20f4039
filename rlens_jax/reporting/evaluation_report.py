"""The HTML report of an evaluation, from the fields of its evaluation.json and timing.json."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from markupsafe import Markup

from rlens_jax.reporting.comparison_report import not_as_asked
from rlens_jax.reporting.page_parts import environment, interval_text, percent, plain_page

Fields = Mapping[str, Any]
_COSTS = (
    "text tokens",
    "visual tokens",
    "kept",
    "mean of the layers",
    "multiply-adds, dense",
    "with the plan",
    "saved",
    "saved with probes",
    "selection",
)
_WITHHELD = "answers withheld"


def evaluation_page(fields: Fields, timing: Fields | None) -> str:
    """The page; `timing` is None if nothing was timed. It holds no images, so its size does not grow with the questions."""
    datasets = fields["datasets"]
    variants = list(next(iter(datasets.values()))["variants"])
    compared = len(variants) > 1
    section = environment().get_template("evaluation.html.jinja")
    rendered = section.render(
        sentences=_sentences(fields),
        variants=variants,
        compared=compared,
        scores=[_scores(name, each, compared) for name, each in datasets.items()],
        cost_columns=_COSTS,
        costs=[(name, _costs(each)) for name, each in datasets.items()],
        times=[] if timing is None else _times(timing),
        timing=timing,
        parts=[(name, variants, rows) for name, each in datasets.items() if (rows := _parts(each))],
    )
    about = {"model": fields["model"]["path"], "num_layers": fields["model"]["num_layers"], "device": fields["device"]}
    return plain_page("Evaluation", f"Plan: {fields['plan']['label']}", Markup(rendered), **about)


def _sentences(fields: Fields) -> list[str]:
    """What a reader must know about the scores, a sentence each."""
    sentences = not_as_asked(fields)
    for name, each in fields["datasets"].items():
        if each["unusable"]:
            sentences.append(f"{name}: {each['unusable']} questions could not be asked and count as wrong.")
        for variant, scored in each["variants"].items():
            if scored["unended"]:
                sentences.append(f"{name}: {scored['unended']} answers of {variant} were cut off at the maximum length.")
        if each["questions_per_image"] > 1:
            sentences.append(f"{name}: {each['questions_per_image']:.1f} questions are about the same images.")
    return sentences


def _scores(name: str, dataset: Fields, compared: bool) -> dict[str, Any]:
    scores = [variant["score"] for variant in dataset["variants"].values()]
    cells = [_WITHHELD if score is None else interval_text(score) for score in scores]
    if compared:
        change = dataset["difference"]
        cells.append("" if change is None else interval_text(change, "+"))
    own: Fields = scores[0] or {"unit": "", "harness": ""}
    return {"name": name, "questions": dataset["questions"], "cells": cells, "unit": own["unit"], "harness": own["harness"]}


def _costs(dataset: Fields) -> list[str]:
    adds = dataset["multiply_adds"]
    tokens = ("text_tokens", "visual_tokens", "kept_visual_tokens", "mean_visual_tokens")
    return [
        *(f"{dataset[name]:,.1f}" for name in tokens),
        *(f"{adds[name]:.3g}" for name in ("dense", "reduced")),
        *(percent(adds[name]) for name in ("saved", "saved_with_probes")),
        percent(adds["selection"] / adds["dense"]),
    ]


def _times(timing: Fields) -> list[tuple[str, list[str]]]:
    """Rows of the table of times: dense, plan, and the share saved."""
    dense, plan = timing["dense"], timing["plan"]
    rows = []
    for name, label in (("prefill", "prefill, ms"), ("first_token", "first token, ms"), ("decode", "further tokens, ms")):
        saved = percent(1 - median(plan[name]) / median(dense[name]))
        rows.append((label, [_range(dense[name]), _range(plan[name]), saved]))
    rates = [f"{each['tokens_per_second']:,.1f}" for each in (dense, plan)]
    return [*rows, ("decoding, tokens/s", [*rates, ""])]


def _parts(dataset: Fields) -> list[tuple[str, list[str]]]:
    """The scores of the parts of a dataset, a column per variant; none if it has a single one or no score."""
    breakdowns = [variant["score"]["breakdown"] for variant in dataset["variants"].values() if variant["score"] is not None]
    names = dict.fromkeys(name for breakdown in breakdowns for name in breakdown)
    return [(name, [f"{breakdown[name]:.2f}" if name in breakdown else "" for breakdown in breakdowns]) for name in names]


def _range(seconds: Sequence[float]) -> str:
    return f"{1e3 * median(seconds):.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"
