"""What the bench makes of outcomes."""

from pathlib import Path

import numpy as np

from rlens_jax.data.samples import Sample
from rlens_jax.engine.inputs import Split
from rlens_jax.paper_studies.study_bench import Bench
from rlens_jax.search.bootstrap import mean_over_datasets
from rlens_jax.search.journal import Journal
from tests.engine.toy import CONFIG
from tests.paper_studies.toy_bench import TOY_CONFIG


def not_needed(*_: object) -> None:
    raise AssertionError("evaluated")


def test_intervals_draw_images(tmp_path: Path) -> None:
    samples = tuple(Sample(f"s{number}", f"half {number % 2}", (), "?", ("a",)) for number in range(12))
    tokens, widths = np.ones(12, int), []
    with Journal.open(tmp_path, {}) as journal:
        for groups in (np.arange(12), np.zeros(12, int)):
            splits = {"test": Split(samples, tokens, tokens, groups, ())}
            bench = Bench(TOY_CONFIG, CONFIG.decoder, splits, journal, not_needed, {})
            table = {name: np.arange(count, dtype=float)[np.newaxis] for name, count in bench.samples.items()}
            interval = bench.interval(table, mean_over_datasets)
            widths.append(float(interval.high[0] - interval.low[0]))
    assert widths[0] > 0 == widths[1]
