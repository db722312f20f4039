"""Measure how many samples a ranking without labels needs: Kendall's tau to the labelled ranking, against the number of samples.

    python benchmarks/label_free_samples.py [--samples 40] [--orders ATTENTION FFN] [--draws 1000] [--output FOLDER]

The labelled rankings are the greedy ones of the embedded model on all its validation samples, by exact match: those given as
11,10,9,... 11,10,9,..., or else searched first. They are compared with one-shot rankings by KL, by agreement and by exact match,
on few samples: so many of each dataset, and fewer. Layers that are ranked by position are left out. Intervals are 95 %
percentiles over draws of images, each with all its questions, as many as give the number of samples; a draw must have samples of
every dataset.

Expect about four minutes on two idle cores, and two with --orders.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from rlens_jax.commands.options import read_config
from rlens_jax.config import Measure, RunConfig
from rlens_jax.data.samples import Sample
from rlens_jax.data.splits import load_splits
from rlens_jax.engine.preparing import image_groups
from rlens_jax.parity.rankings import kendall_tau
from rlens_jax.plans import OPERATORS, Operator, Plan
from rlens_jax.ranking.ranking_run import rank
from rlens_jax.search.journal import JOURNAL_NAME, Journal
from rlens_jax.search.objective import comparable, score_outcomes
from rlens_jax.search.ranking_file import RANKING, read_ranking

MEASURES: tuple[Measure, ...] = ("kl", "agreement", "teacher_forced")
SIZES = (12, 24, 48, 120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40, help="samples of each of the three datasets")
    parser.add_argument("--orders", nargs=2, metavar=("ATTENTION", "FFN"), help="the labelled rankings")
    parser.add_argument("--draws", type=int, default=1000, help="draws of an interval")
    parser.add_argument("--output", type=Path, default=Path("runs/label_free"), help="folder of the runs")
    options = parser.parse_args()
    if options.orders is None:
        rank(config_of(options.output / "labelled"))
        orders = read_ranking(options.output / "labelled" / RANKING).orders
    else:
        orders = {name: tuple(map(int, text.split(","))) for name, text in zip(OPERATORS, options.orders, strict=True)}
    few = ("data.validation_samples", str(options.samples)), ("search.method", "one_shot")
    for measure in MEASURES:
        config = config_of(options.output / measure, *few, ("search.objective", measure))
        rank(config)
        samples = list(load_splits(config.data, no_prompt, seed=config.seed)["validation"])
        for operator in OPERATORS:
            num_layers = len(orders[operator])
            searched = orders[operator][num_layers // 4 :]
            outcomes = outcomes_of(options.output / measure, operator, num_layers, searched, len(samples))
            taus = partial(taus_of, config, outcomes, searched, samples)
            whole = taus(np.ones((1, len(samples))))[0]
            print(f"{operator}, {measure}, all {len(samples)} samples: tau {whole:.2f}")
            for size in (size for size in SIZES if size <= len(samples)):
                drawn = taus(draws(samples, size, options.draws))
                low, high = np.percentile(drawn, (2.5, 97.5))
                print(f"  {size} samples: mean {drawn.mean():.2f}, 95 % {low:.2f} to {high:.2f} ({len(drawn)} draws)")


def no_prompt(instance: object) -> None:
    """Pages have no benchmark questions."""
    raise AssertionError(instance)


def config_of(output: Path, *settings: tuple[str, str]) -> RunConfig:
    """The embedded preset, ending with the rankings."""
    return read_config([("config", "embedded"), ("report.extent", "none"), ("output", str(output)), *settings])


def outcomes_of(
    folder: Path, operator: Operator, num_layers: int, searched: Sequence[int], samples: int
) -> dict[Plan, np.ndarray]:
    """The outcomes of the dense plan, and of each searched layer on top of those ranked by position: float64[samples]."""
    with (folder / JOURNAL_NAME).open() as lines:
        fingerprint = json.loads(next(lines))["fingerprint"]
    by_position = [layer for layer in range(num_layers) if layer not in searched]
    base = Plan()
    for layer in by_position:
        base = base.with_layer(operator, layer)
    with Journal.follow(folder, fingerprint) as journal:
        plans = [Plan(), *(base.with_layer(operator, layer) for layer in sorted(searched))]
        return {plan: journal.outcomes("validation", plan, samples) for plan in plans}


def draws(samples: Sequence[Sample], size: int, count: int) -> np.ndarray:
    """How often each draw takes each sample: float64[draws, samples]."""
    groups = np.array(image_groups(samples))
    images, of_image = np.unique(groups, return_inverse=True)
    number = max(1, round(size * len(images) / len(samples)))
    drawn = np.random.default_rng(0).multinomial(number, np.full(len(images), 1 / len(images)), count)
    return drawn[:, of_image].astype(np.float64)


def taus_of(
    config: RunConfig,
    outcomes: Mapping[Plan, np.ndarray],
    searched: Sequence[int],
    samples: Sequence[Sample],
    weights: np.ndarray,
) -> np.ndarray:
    """Kendall's tau of the one-shot order of each draw to the labelled order; draws without a dataset are left out."""
    names = sorted({sample.dataset for sample in samples})
    members = {name: np.array([sample.dataset == name for sample in samples]) for name in names}
    search, taus = config.search, []
    for times in weights:
        count = {name: np.repeat(np.flatnonzero(mine), times[mine].astype(int)) for name, mine in members.items()}
        dense = {name: float(np.mean(outcomes[Plan()][drawn])) if len(drawn) else 0.0 for name, drawn in count.items()}
        if not all(len(drawn) for drawn in count.values()) or (search.relative and not all(dense.values())):
            continue
        scores = []
        for plan in list(outcomes)[1:]:
            of = {name: outcomes[plan][drawn] for name, drawn in count.items()}
            scored = score_outcomes(of, dense, alpha=search.alpha, relative=search.relative, best=search.best_outcome)
            scores.append(comparable(scored.score))
        layers = sorted(searched)
        order = sorted(layers, key=lambda layer: (-scores[layers.index(layer)], -layer))
        taus.append(kendall_tau(tuple(searched), tuple(order)))
    return np.array(taus)


if __name__ == "__main__":
    main()
