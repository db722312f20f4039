"""A finished run in words: `report.md`, and the summary that the command prints."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from rlens_jax.config import DIVERGENCES
from rlens_jax.errors import printable
from rlens_jax.plans import Operator
from rlens_jax.reporting.measure_text import loss_text, metric_text, objective_text
from rlens_jax.search.bootstrap import Interval
from rlens_jax.search.results import ALLOWED_LOSS, OperatorResult, Results, Searched, Strategy
from rlens_jax.search.search import Ranking

TITLES = {"attention": "Hollow Attention", "ffn": "Probe-Activated Dynamic FFN", "both": "both at once"}
METHODS = {"greedy": "searched", "one_shot": "sorted by their scores in one round (one-shot, no greedy search)"}
ONE_SHOT = ", one-shot"
WIDTH = 100
"""Most columns of the summary, which has at most 25 lines."""
_MOST_RANKING_LINES = 3
_MARKUP = re.compile(r"[\\`*<>&|\[\]!~$#]|(?<![^\W_])_|_(?![^\W_])")
"""Characters with a meaning in Markdown; _ inside a word has none."""
_STRATEGY_TEXTS: dict[Strategy, str] = {
    "searched": "searched",
    "search_all": "searched, no layer by position (L_p = 0)",
    "position": "by position, last layer first",
    "random": "random (mean of the rankings)",
}
_STOPPING_TEXTS = {
    "exact": "candidates are dropped when they cannot win their round any more",
    "none": "all candidates are evaluated on all samples",
}
_STOPPED_EARLY = (
    "Stopped early: the evaluation of a candidate ended when it could not become the best of its round any more, even with all "
    "other samples right. Its score is an upper bound and is marked so. Rankings, ties and the scores of all chosen layers are "
    "those of a full evaluation; `--search.stopping none` makes one."
)
_AGAIN = (
    "`python -m rlens_jax.rank --config config.yaml --output ANOTHER_FOLDER`, with the `config.yaml` in this folder. "
    "`ranking.json` contains the rankings, every evaluation and every number above except times, which are in `timing.json`. "
    "The same configuration, model and data on the same kind of device give the same `ranking.json`, byte for byte."
)


def report_markdown(results: Results) -> str:
    """The text of report.md."""
    parts = [
        "# Which layers waste visual computation",
        _run_facts(results),
        "## Rankings, best to reduce first",
        _rankings(results),
        f"## Savings at less than {_percent(ALLOWED_LOSS, 0)} loss",
        _savings(results),
        f"## Does the search beat {'position and chance' if results.config.report.random_rankings else 'position'}?",
        "![Held-out score against the number of reduced layers](curves.svg)",
        *(_quality(name, result, results) for name, result in results.operators.items()),
        "## How much the layers differ",
        _differences(results),
    ]
    if any(result.ranking.rounds for result in results.operators.values()):
        parts.append("![Scores of all candidates, round by round](candidates.svg)")
    parts += ["## How to run it again", _AGAIN]
    return "\n\n".join(parts) + "\n"


def ranking_title(ranking: Ranking) -> str:
    """The operator's title; it says if the ranking is only a one-shot one."""
    return TITLES[ranking.operator] + (ONE_SHOT if ranking.method == "one_shot" else "")


def found(ranking: Ranking) -> str:
    """A ranking in two lines, for the terminal, as soon as it is found."""
    scores = " ".join(f"{point.score:.3f}" for point in ranking.curve())
    order = " ".join(map(str, ranking.order))
    return f"{ranking_title(ranking)}, best to reduce first: {order}\n  scores with 0, 1, 2, ... of them reduced: {scores}"


def summary(results: Searched, folder: Path) -> str:
    """The two rankings, their savings, the verdict on the search, and the path of the report, for the terminal."""
    one_shot = ", one-shot (no greedy search)" if results.config.search.method == "one_shot" else ""
    lines = [f"Layers in the order in which to reduce them, best first{one_shot}:"]
    for name, ranking in results.rankings.items():
        lines += _wrapped_order(TITLES[name], ranking.order)
    if not isinstance(results, Results):
        return "\n".join([*lines, "", f"Ranking: {folder / 'ranking.json'}"])
    samples = sum(results.test_samples.values())
    lines += ["", f"At less than {_percent(ALLOWED_LOSS, 0)} loss of each operator alone, on {samples} held-out samples:"]
    lines.append(f"  {'':<28}{'layers':>9}{'loss':>9}{'FLOPs saved':>13}{'with probes':>13}{'time saved':>13}")
    for plan in results.savings:
        loss, *shares = _saving_cells(results, plan, unmeasured="-")
        cells = "".join(f"{share:>13}" for share in shares)
        lines.append(f"  {TITLES[plan]:<28}{_layer_count(results, plan):>9}{loss:>9}{cells}")
    lines += ["  (time: measured with the work skipped, prefill against dense, medians)", ""]
    for result in results.operators.values():
        others = ", ".join(
            f"{'L_p = 0' if other == 'search_all' else other} {_percent(float(area.value))}"
            for other, area in result.areas.items()
            if other != "searched"
        )
        losers = _unbeaten(result)
        verdict = f"beats {' and '.join(_rivals(result))}" if losers is None else f"NOT better than {losers}"
        text = f"{ranking_title(result.ranking)}: area {_percent(float(result.areas['searched'].value))} ({others}): {verdict}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    lines += ["", f"Report: {folder / 'report.html'} (as text: report.md)"]
    return "\n".join(lines)


def _wrapped_order(title: str, order: tuple[int, ...]) -> list[str]:
    lines = textwrap.wrap(" ".join(map(str, order)), WIDTH - 30)
    if len(lines) > _MOST_RANKING_LINES:
        lines = [*lines[: _MOST_RANKING_LINES - 1], f"{lines[_MOST_RANKING_LINES - 1][: WIDTH - 40]} ..."]
    return [f"  {title if number == 0 else '':<28}{line}" for number, line in enumerate(lines)]


def _layer_count(results: Results, name: str) -> str:
    """The number of layers that a saving reduces: "5 of 12", or "5 + 7" for both operators."""
    counts = {str(operator): result.curves["searched"].allowed for operator, result in results.operators.items()}
    return f"{counts[name]} of {results.num_layers}" if name in counts else " + ".join(map(str, counts.values()))


def _saving_cells(results: Results, name: str, unmeasured: str) -> list[str]:
    """Loss, FLOPs saved without and with probes, and time saved, of the saving `name`."""
    saving, time = results.savings[name], results.timing.prefill.get(name)
    shares = [_percent(share) for share in (saving.loss, saving.flops, saving.flops_with_probes)]
    return [*shares, unmeasured if time is None else _percent(time.saved)]


def _run_facts(results: Results) -> str:
    config, timing = results.config, results.timing
    reduction, compute = config.reduction, config.compute
    rows = [
        (
            "model",
            f"{markdown_code(config.model)}, {results.num_layers} decoder layers, weights {markdown_text(results.model_hash)}",
        ),
        ("data", f"{markdown_code(str(config.data.source))}, samples {markdown_text(results.data_hash)}"),
        (
            "reduction",
            f"attention range {reduction.attention_range}, {_percent(float(reduction.active_fraction))} of the FFN "
            f"units, {reduction.probe} probes ({_percent(float(reduction.probe_fraction))})",
        ),
        ("objective", f"{objective_text(config.to_dict())}; {_STOPPING_TEXTS[config.search.by(config.search.method).stopping]}"),
        ("precision", f"{compute.dtype}, matmul precision {compute.matmul_precision}"),
        ("device", f"{timing.num_devices} x {markdown_text(timing.device)}, {timing.num_cores} CPU cores"),
        ("time", ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in timing.seconds.items())),
        (
            "evaluations",
            f"{timing.evaluations} samples under a plan by this process, {timing.resumed} read from the journal; "
            f"{timing.compilations} programs compiled",
        ),
        ("versions", markdown_text(", ".join(f"{name} {version}" for name, version in results.versions.items()))),
    ]
    datasets = []
    for name, dense_test in results.dense_test.items():
        samples = (str(results.validation_samples[name]), str(results.test_samples[name]))
        dense = metric_text(config.search.measure, results.dense_validation[name])
        datasets.append((markdown_text(name), *samples, dense, _percent(dense_test)))
    titles = ("dataset", "validation samples", "held-out samples", "dense on validation", "dense held out")
    return markdown_table(("what", "value"), rows) + "\n\n" + markdown_table(titles, datasets)


def _rankings(results: Results) -> str:
    lines = []
    for name, result in results.operators.items():
        by_position = len(result.ranking.prefix_scores)
        how = METHODS[result.ranking.method]
        note = f"the first {by_position} by position, the others {how}" if by_position else f"all {how}"
        lines.append(f"- **{TITLES[name]}** ({note}): {', '.join(map(str, result.ranking.order))}")
        if result.ranking.noise:
            lines.append(f"  Scores that differ by at most {result.ranking.noise:.2g} are ties: so much rounding alone can make.")
    return "\n".join(lines)


def _savings(results: Results) -> str:
    titles = ("reduced", "layers", "loss", "FLOPs saved", "FLOPs saved, probes counted", "time saved, measured")
    rows = [
        (TITLES[name], saving.plan.label(), *_saving_cells(results, name, unmeasured="not measured"))
        for name, saving in results.savings.items()
    ]
    lines = [
        markdown_table(titles, rows),
        f"Layers: the first k of the ranking, where k is the largest number with a loss below {_percent(ALLOWED_LOSS, 0)} on "
        f"the held-out samples; a smaller number may lose more. Loss: minus the mean {results.config.search.change} change "
        "against the dense model, over the datasets. FLOPs: multiply-adds of the decoder layers in the prefill, counted for "
        "all pairs of tokens, as is usual; a negative number means more than dense.",
    ]
    if results.combined is not None and results.combined.loss >= ALLOWED_LOSS:
        lines.append(
            f"Each operator alone stays below {_percent(ALLOWED_LOSS, 0)}; both at once lose "
            f"{_percent(results.combined.loss)}, because their losses add up."
        )
    time = next(iter(results.timing.prefill.values()), None)
    if time is not None:
        lines.append(
            f"Time is *measured*: the prefill of {time.samples} samples ({time.text_slots} text and "
            f"{time.visual_slots} visual slots each), in which the reduced work is skipped, against the dense model, side "
            f"by side, medians of {len(time.dense)} repeats. Nothing here is simulated with masks."
        )
    if results.divergences:
        largest = ", ".join(f"{TITLES[name]} {value:.3g}" for name, value in results.divergences.items())
        lines.append(f"Largest KL(dense || plan) at one token of an answer to a validation sample, in nats: {largest}.")
    return "\n\n".join(lines)


def _quality(name: Operator, result: OperatorResult, results: Results) -> str:
    titles = ("order", "area under the curve (%)", "searched minus this (points)")
    rows = []
    for strategy, area in result.areas.items():
        margin = "" if strategy == "searched" else _interval(result.margins[strategy], sign=True)
        rows.append((_STRATEGY_TEXTS[strategy], _interval(area), margin))
    points = ", ".join(map(str, result.area_points))
    note = (
        f"Area under the held-out curve over {points} reduced layers, with 95 % bootstrap intervals: a draw takes images, each "
        "with all its questions. Differences are taken on the same draws."
    )
    return "\n\n".join([f"### {ranking_title(result.ranking)}", markdown_table(titles, rows), note, _verdict(result, results)])


def _rivals(result: OperatorResult) -> list[Strategy]:
    """The orders that need no search: by position, and random if there are any."""
    return [name for name in ("position", "random") if name in result.margins]


def _unbeaten(result: OperatorResult) -> str | None:
    """Those of the rivals that the searched order does not beat on held-out samples; None if it beats all."""
    return " and ".join(name for name in _rivals(result) if not result.beats[name]) or None


def _verdict(result: OperatorResult, results: Results) -> str:
    losers = _unbeaten(result)
    if losers is None:
        rivals = _rivals(result)
        intervals = "intervals of both differences lie" if len(rivals) > 1 else "interval of the difference lies"
        return f"The searched order beats {' and '.join(rivals)}: the {intervals} above 0."
    samples = sum(results.validation_samples.values())
    reasons = [
        f"{len(result.ranking.prefix_scores)} of {len(result.ranking.order)} layers are ranked by position in both orders",
        f"the search maximises a score that weighs drops more, on {samples} validation samples; the curve is a plain "
        f"mean over {sum(results.test_samples.values())} others",
    ]
    if result.tied_share:
        reasons.append(
            f"{_percent(result.tied_share, 0)} of the other candidates of a round tie with the winner, and position breaks ties"
        )
    better = result.areas.get("search_all")
    if better is not None and float(better.value) > float(result.areas["searched"].value):
        reasons.append("searching every layer (L_p = 0) gives a larger area, so the layers ranked by position cost some")
    behind = [name for name in _rivals(result) if float(result.margins[name].value) < 0]
    estimate = f"it is behind {' and '.join(behind)}" if behind else "it is not behind, but the interval reaches 0"
    return (
        f"**The searched order does not beat {losers}** beyond the 95 % interval; by the point estimate "
        f"{estimate}. Possible reasons:\n\n" + "\n".join(f"- {reason}" for reason in reasons)
    )


def _differences(results: Results) -> str:
    """How far apart the candidates are: whether there was anything to find."""
    dense = fmean(results.dense_test.values())
    rows = []
    for name, result in results.operators.items():
        reduced = float(result.curves["searched"].mean.value[-1])
        ranking, ties = result.ranking, sum(bool(round_.ties) for round_ in result.ranking.rounds)
        least = "at least " if any(score.bound for round_ in ranking.rounds[:1] for score in round_.scores) else ""
        rows.append(
            (
                TITLES[name],
                f"{reduced / dense:.2f} x dense" if dense else "dense scores 0",
                f"{least}{_spread(result, results)}",
                _percent(result.tied_share, 0),
                f"{ties} of {len(ranking.rounds)}",
                f"{ranking.stopped_early} of {ranking.num_candidates}",
            )
        )
    titles = (
        "operator",
        "all layers reduced, held out",
        "best and worst candidate of round 1 differ by",
        "candidates tied with the winner, mean over rounds",
        "rounds with a tie",
        "candidates stopped early",
    )
    table = markdown_table(titles, rows)
    if not any(result.ranking.stopped_early for result in results.operators.values()):
        return table
    return f"{table}\n\n{_STOPPED_EARLY}"


def _spread(result: OperatorResult, results: Results) -> str:
    """How far apart the best and the worst candidate of the first round are."""
    samples, measure = results.validation_samples, results.config.search.measure
    spread = result.first_round_spread(samples)
    return f"{loss_text(measure, spread / sum(samples.values()))} a sample" if measure in DIVERGENCES else f"{spread:.0f} samples"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, without a newline at the end; the cells are Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown_text(text: str) -> str:
    """Text that comes from data, as Markdown of one line that shows it and nothing else."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", printable(" ".join(text.split())))


def markdown_code(text: str) -> str:
    """Text that comes from data, as a code span of one line."""
    text = printable(" ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _percent(share: float, digits: int = 1) -> str:
    # Adding 0 turns the -0.0 of a tiny negative share into 0.0.
    return f"{round(100 * share, digits) + 0:.{digits}f} %"


def _interval(interval: Interval, sign: bool = False) -> str:
    value, low, high = (100 * float(bound) for bound in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})" if sign else f"{value:.1f} ({low:.1f} to {high:.1f})"
