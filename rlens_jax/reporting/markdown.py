"""`report.md`: what was run, what was found, and how far it can be trusted, for people."""

from collections.abc import Iterable, Sequence

from rlens_jax.plan import Operator
from rlens_jax.search.bootstrap import Interval
from rlens_jax.search.results import ALLOWED_LOSS, OperatorResult, Results, Strategy

TITLES = {
    "attention": "Hollow Attention",
    "ffn": "Probe-Activated Dynamic FFN",
    "both": "both at once",
}
_STRATEGY_TEXTS: dict[Strategy, str] = {
    "searched": "searched",
    "search_all": "searched, no layer by position (L_p = 0)",
    "position": "by position, last layer first",
    "random": "random (mean of the rankings)",
}
_AGAIN = (
    "`python -m rlens_jax.rank --config config.yaml --output ANOTHER_FOLDER`, with the `config.yaml` beside "
    "this report. `ranking.json` has the rankings, every evaluation and every number above but times, which "
    "are in `timing.json`. The same configuration, model and data on the same kind of device give the same "
    "`ranking.json`, byte for byte."
)


def report_markdown(results: Results) -> str:
    """The whole report."""
    parts = [
        "# Which layers waste visual computation",
        _what_was_run(results),
        "## Rankings, best to reduce first",
        _rankings(results),
        f"## What can be saved at less than {_percent(ALLOWED_LOSS, 0)} loss",
        _savings(results),
        "## Does the search beat position and chance?",
        "![Held-out score against the number of reduced layers](curves.svg)",
        *(_quality(name, result, results) for name, result in results.operators.items()),
        "## What there was to find",
        _to_find(results),
    ]
    if any(result.ranking.rounds for result in results.operators.values()):
        parts.append("![Scores of all candidates, round by round](candidates.svg)")
    parts += ["## To run it again", _AGAIN]
    return "\n\n".join(parts) + "\n"


def unbeaten(result: OperatorResult) -> str | None:
    """Which of position and random the searched order does not beat on held-out samples; None when both."""
    return " and ".join(n for n in ("position", "random") if not result.beats[n]) or None


def _what_was_run(results: Results) -> str:
    config, timing = results.config, results.timing
    reduction, compute = config.reduction, config.compute
    rows = [
        ("model", f"`{config.model}`, {results.num_layers} decoder layers, weights {results.model_hash}"),
        ("data", f"`{config.data.source}`, samples {results.data_hash}"),
        (
            "reduction",
            (
                f"attention range {reduction.attention_range}, "
                f"{_percent(float(reduction.active_fraction))} of the FFN units, "
                f"{reduction.probe} probes ({_percent(float(reduction.probe_fraction))})"
            ),
        ),
        (
            "objective",
            (
                f"{config.search.objective.replace('_', ' ')}, {config.search.change} change, "
                f"drops weigh {config.search.penalty:g} times"
            ),
        ),
        ("precision", f"{compute.dtype}, matmul precision {compute.matmul_precision}"),
        ("device", f"{timing.num_devices} x {timing.device}, {timing.num_cores} CPU cores"),
        ("time", ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in timing.seconds.items())),
        (
            "evaluations",
            (
                f"{timing.evaluations} made by this process, {timing.resumed} read from the journal; "
                f"{timing.compilations} programs compiled"
            ),
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())),
    ]
    datasets = [
        (
            name,
            f"{results.validation_samples[name]}",
            f"{results.test_samples[name]}",
            _percent(results.dense_validation[name]),
            _percent(results.dense_test[name]),
        )
        for name in results.dense_test
    ]
    titles = ("dataset", "validation samples", "held-out samples", "dense on validation", "dense held out")
    return _table(("what", "value"), rows) + "\n\n" + _table(titles, datasets)


def _rankings(results: Results) -> str:
    lines = []
    for name, result in results.operators.items():
        ranking = result.ranking
        by_position = len(ranking.prefix_scores)
        note = f"the first {by_position} by their position, the others searched" if by_position else "all searched"
        order = ", ".join(map(str, ranking.order))
        lines.append(f"- **{TITLES[name]}** ({note}): {order}")
    return "\n".join(lines)


def _savings(results: Results) -> str:
    rows = []
    for name, saving in results.savings.items():
        time = results.timing.prefill.get(name)
        rows.append(
            (
                TITLES[name],
                saving.plan.label(),
                _percent(saving.loss),
                _percent(saving.flops),
                _percent(saving.flops_with_probes),
                "not measured" if time is None else _percent(time.saved),
            )
        )
    titles = (
        "reduced",
        "layers",
        "loss",
        "FLOPs saved",
        "FLOPs saved, probes counted",
        "time saved, measured",
    )
    lines = [
        _table(titles, rows),
        (
            "Layers: the first k of the ranking, with k the largest number whose loss on the held-out samples is "
            f"below {_percent(ALLOWED_LOSS, 0)}; a smaller number may lose more. Loss: minus the mean over the "
            f"datasets of the {results.config.search.change} change against the dense model. FLOPs: "
            "multiply-adds of the decoder layers in the prefill, as the field counts them (all pairs of "
            "tokens); negative means more than dense."
        ),
    ]
    if results.combined is not None and results.combined.loss >= ALLOWED_LOSS:
        lines.append(
            f"Each operator by itself stays below {_percent(ALLOWED_LOSS, 0)}; both at once lose "
            f"{_percent(results.combined.loss)}, because their losses add up."
        )
    times = list(results.timing.prefill.values())
    if times:
        time = times[0]
        lines.append(
            f"Time is *measured*: the prefill of {time.samples} samples ({time.text_slots} text and "
            f"{time.visual_slots} visual slots each) with the reduced work really skipped, against the dense "
            f"model, side by side, medians of {len(time.dense)}. Nothing here is a masked simulation."
        )
    return "\n\n".join(lines)


def _quality(name: Operator, result: OperatorResult, results: Results) -> str:
    rows = [
        (
            _STRATEGY_TEXTS[strategy],
            _interval(area),
            "" if strategy == "searched" else _interval(result.margins[strategy], sign=True),
        )
        for strategy, area in result.areas.items()
    ]
    points = ", ".join(map(str, result.area_points))
    titles = ("order", "area under the curve (%)", "searched minus this (points)")
    return "\n\n".join(
        [
            f"### {TITLES[name]}",
            _table(titles, rows),
            (
                f"Area under the held-out curve over {points} reduced layers, with 95 % bootstrap intervals; "
                "differences are taken on the same draws."
            ),
            _verdict(result, results),
        ]
    )


def _verdict(result: OperatorResult, results: Results) -> str:
    losers = unbeaten(result)
    if losers is None:
        return "The searched order beats position and random: the intervals of both differences lie above 0."
    samples = sum(results.validation_samples.values())
    reasons = [
        (
            f"{len(result.ranking.prefix_scores)} of {len(result.ranking.order)} layers are ranked by position "
            "in both orders"
        ),
        (
            f"the search maximises a score that weighs drops more, on {samples} validation samples; "
            f"the curve is a plain mean over {sum(results.test_samples.values())} others"
        ),
    ]
    if result.tied_share:
        reasons.append(
            f"{_percent(result.tied_share, 0)} of a round's other candidates tie with the winner, and ties "
            "are broken by position"
        )
    better = result.areas.get("search_all")
    if better is not None and float(better.value) > float(result.areas["searched"].value):
        reasons.append("searching every layer (L_p = 0) gives a larger area, so the position prefix costs something")
    behind = [name for name in ("position", "random") if float(result.margins[name].value) < 0]
    estimate = f"it is behind {' and '.join(behind)}" if behind else "it is not behind, but the interval reaches 0"
    return (
        f"**The searched order does not beat {losers}** beyond the 95 % interval; by the point estimate "
        f"{estimate}. What may explain it:\n\n" + "\n".join(f"- {reason}" for reason in reasons)
    )


def _to_find(results: Results) -> str:
    dense = _mean(results.dense_test.values())
    rows = []
    for name, result in results.operators.items():
        reduced = float(result.curves["searched"].mean.value[-1])
        ties = sum(bool(round_.ties) for round_ in result.ranking.rounds)
        rows.append(
            (
                TITLES[name],
                f"{reduced / dense:.2f} x dense" if dense else "dense scores 0",
                f"{result.first_round_spread(results.validation_samples):.0f} samples",
                _percent(result.tied_share, 0),
                f"{ties} of {len(result.ranking.rounds)}",
            )
        )
    titles = (
        "operator",
        "all layers reduced, held out",
        "best and worst candidate of round 1 differ by",
        "candidates tied with the winner, mean over rounds",
        "rounds with a tie",
    )
    return _table(titles, rows)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _percent(share: float, digits: int = 1) -> str:
    # Adding 0 turns the -0.0 of a tiny negative share into 0.0.
    return f"{round(100 * share, digits) + 0:.{digits}f} %"


def _interval(interval: Interval, sign: bool = False) -> str:
    value, low, high = (100 * float(bound) for bound in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})" if sign else f"{value:.1f} ({low:.1f} to {high:.1f})"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
