"""What a person at the terminal sees when a run has finished: at most 25 lines of at most 100 columns."""

import textwrap
from pathlib import Path

from rlens_jax.reporting.markdown import TITLES, unbeaten
from rlens_jax.search.results import ALLOWED_LOSS, Results

WIDTH = 100
_MOST_RANKING_LINES = 3


def summary(results: Results, folder: Path) -> str:
    """The two rankings, what they save, whether the search was worth it, and where the rest is."""
    lines = ["Layers in the order in which to reduce them, best first:"]
    for name, result in results.operators.items():
        lines += _ranking(TITLES[name], result.ranking.order)

    samples = sum(results.test_samples.values())
    lines.append("")
    lines.append(f"At less than {_percent(ALLOWED_LOSS, 0)} loss of each by itself, on {samples} held-out samples:")
    lines.append(f"  {'':<28}{'layers':>9}{'loss':>9}{'FLOPs saved':>13}{'with probes':>13}{'time saved':>13}")
    for case, saving in results.savings.items():
        time = results.timing.prefill.get(case)
        numbers = [
            f"{result.curves['searched'].allowed}"
            for operator, result in results.operators.items()
            if case in (operator, "both")
        ]
        count = " + ".join(numbers) if case == "both" else f"{numbers[0]} of {results.num_layers}"
        shares = (saving.flops, saving.flops_with_probes, None if time is None else time.saved)
        cells = "".join(f"{_percent(share):>13}" for share in shares)
        lines.append(f"  {TITLES[case]:<28}{count:>9}{_percent(saving.loss):>9}{cells}")
    lines.append("  (time: measured with the work skipped, prefill against dense, medians)")

    lines.append("")
    for name, result in results.operators.items():
        searched, losers = result.areas["searched"], unbeaten(result)
        others = ", ".join(
            f"{'L_p = 0' if other == 'search_all' else other} {_percent(float(area.value))}"
            for other, area in result.areas.items()
            if other != "searched"
        )
        verdict = "beats position and random" if losers is None else f"NOT better than {losers}"
        text = f"{TITLES[name]}: area {_percent(float(searched.value))} ({others}): {verdict}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    lines += ["", f"Report: {folder / 'report.html'} (as text: report.md)"]
    return "\n".join(lines)


def _ranking(title: str, order: tuple[int, ...]) -> list[str]:
    lines = textwrap.wrap(" ".join(map(str, order)), WIDTH - 30)
    if len(lines) > _MOST_RANKING_LINES:
        lines = [*lines[: _MOST_RANKING_LINES - 1], f"{lines[_MOST_RANKING_LINES - 1][: WIDTH - 40]} ..."]
    return [f"  {title if number == 0 else '':<28}{line}" for number, line in enumerate(lines)]


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{round(100 * share, digits) + 0:.{digits}f} %"
