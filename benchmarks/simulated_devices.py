"""Compare the results of every mesh with those of one device.

    python benchmarks/simulated_devices.py [--samples N] [--dtype bfloat16] [--json FILE]

Ranks the last layers of the embedded model on 1, 2, 4 and 8 simulated CPU devices, with all meshes (work, model). Compares the
outcome of every sample under every plan, the rankings, and the mean log-probability of each answer. Also finds samples whose
outcome depends on rounding under some plan of the search: with a logit margin below 1e-4, or a relative gap below 1e-5 between
the last kept and the first dropped unit.

Expect equal outcomes and rankings on all meshes, and log-probabilities that differ by rounding; it takes some minutes. In
bfloat16 sums over more shards are other sums: there it shows by how much, and how many outcomes change.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.commands.options import read_config
from rlens_jax.config import SearchConfig
from rlens_jax.data.splits import load_splits
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.inputs import Split, build_split
from rlens_jax.engine.preparing import prepare
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.racing import RoundScorer
from rlens_jax.engine.scoring import TeacherForcing
from rlens_jax.engine.shapes import choose_shapes
from rlens_jax.hosts.processes import Processes
from rlens_jax.models.prompt import FILLER, IGNORE
from rlens_jax.ops.ffn import hidden_units, probe_slots
from rlens_jax.plans import OPERATORS, Plan, Reduction
from rlens_jax.search.journal import Journal
from rlens_jax.search.objective import PlanScore, dataset_metrics
from rlens_jax.search.search import rank_layers
from rlens_jax.sharding.mesh import make_mesh

SEARCHED = 3
"""Searched layers; the others are ranked by position."""
LOGIT_MARGIN, UNIT_GAP = 1e-4, 1e-5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16, help="validation samples per dataset")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    splits = [(devices, model) for devices in (1, 2, 4, 8) for model in (1, 2, 4, 8) if model <= devices]
    expected, results = None, []
    for devices, model_shards in splits:
        began = time.monotonic()
        measured = search(options.samples, devices, model_shards, options.dtype)
        expected = expected or measured
        difference = max(
            float(np.abs(measured["log_probability"][plan] - values).max())
            for plan, values in expected["log_probability"].items()
        )
        changed = [np.array(measured["outcomes"][plan]) != values for plan, values in expected["outcomes"].items()]
        results.append(
            {
                "work": devices // model_shards,
                "model": model_shards,
                "outcomes_that_differ": float(np.mean(changed)),
                "same_rankings": measured["rankings"] == expected["rankings"],
                "log_probability_difference": difference,
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        print(results[-1], flush=True)
    close = {name: expected.get(name) for name in ("logit_margin", "unit_gap")}
    print(f"evaluations compared: {len(expected['outcomes'])}; nearest to a tie: {close}")
    if options.json:
        options.json.write_text(json.dumps({"meshes": results, "nearest_to_a_tie": close}, indent=1) + "\n")


def search(samples: int, devices: int, model_shards: int, dtype: str) -> dict[str, Any]:
    """Both rankings, with the outcomes and log-probabilities behind them."""
    config = read_config([("config", "embedded"), ("data.validation_samples", str(samples)), ("data.test_samples", "1")])
    folder = find_model("embedded")
    mesh = make_mesh(jax.devices()[:devices], model_shards)
    kind, model = load_model(folder, jnp.dtype(dtype), mesh=mesh)
    preparer = kind.preparer(folder)
    stop_tokens = preparer.chat.stop_tokens
    programs = Programs(model, mesh, config.reduction, seed=0, new_tokens=1, stop_tokens=stop_tokens)
    members = load_splits(config.data, kind.benchmark_prompt, seed=config.seed)["validation"]
    prepared = prepare(members, preparer, True, Processes())
    shapes = replace(choose_shapes(config.compute, kind, [prepared]), batch_size=8)
    split = build_split(members, preparer, programs, shapes, True)
    num_layers = kind.config.decoder.num_layers
    plans: dict[Plan, None] = {}
    rankings = {}
    with tempfile.TemporaryDirectory() as scratch, Journal.open(Path(scratch), {}) as journal:
        evaluator = Evaluator(TeacherForcing(programs), {"validation": split}, journal, state_bytes=1e9)

        (dense,) = map(dataset_metrics, evaluator.outcomes("validation", Plan(), [Plan()]))
        scorer = RoundScorer(evaluator, "validation", dense, SearchConfig(stopping="none"))
        plans[Plan()] = None

        def score_round(base: Plan, candidates: list[Plan]) -> list[PlanScore]:
            plans.update(dict.fromkeys(candidates))
            return scorer(base, candidates)

        for operator in OPERATORS:
            rankings[operator] = rank_layers(num_layers, num_layers - SEARCHED, operator, score_round).order
        outcomes = {plan: journal.outcomes("validation", plan, len(members)).tolist() for plan in plans}
    log_probability = {plan: log_probabilities(programs, split, plan) for plan in list(plans)[::5]}
    measured = {"outcomes": outcomes, "rankings": rankings, "log_probability": log_probability}
    if devices == 1 and dtype == "float32":
        alone = build_split(members, preparer, programs, shapes, True, sharing=False)
        ties = [nearest_to_a_tie(model.decoder, alone, plan, config.reduction) for plan in plans]
        measured |= {name: min(float(tie[name].min()) for tie in ties) for name in ("logit_margin", "unit_gap")}
        for plan, tie in zip(plans, ties, strict=True):
            for number in np.flatnonzero((tie["logit_margin"] < LOGIT_MARGIN) | (tie["unit_gap"] < UNIT_GAP)):
                print(f"depends on rounding: {split.samples[number].id} under {plan.label()}")
    return measured


def log_probabilities(programs: Programs, split: Split, plan: Plan) -> np.ndarray:
    """The mean log-probability of each sample's answer."""
    values = np.full(len(split.samples), np.nan)
    for batch in split.batches:
        states = programs.embed(batch.inputs.text_ids, batch.visual)
        states = programs.layers(states, batch.inputs, plan, 0, programs.config.num_layers)
        numbers, _, value, _ = map(np.asarray, programs.outcome(states, batch.inputs))
        values[numbers[numbers != FILLER]] = value[numbers != FILLER]
    return values


def nearest_to_a_tie(decoder: Any, split: Split, plan: Plan, reduction: Reduction) -> dict[str, np.ndarray]:
    """Per sample, the smallest margin of an answer token's best logit, and the smallest gap of kept over dropped units."""
    margins, gaps = np.full(len(split.samples), np.inf), np.full(len(split.samples), np.inf)
    graph, stack = nnx.split(decoder.layers)
    units = reduction.kept_units(decoder.config.ffn_width)

    @jax.jit
    def gap(y: Any, weights: Any, layout: Any) -> Any:
        slots, is_probe = probe_slots(layout, reduction, jax.random.key(0))
        probes = jnp.take_along_axis(y[:, layout.bucket.text :], slots[:, :, None], axis=1)
        hidden = jnp.where(is_probe[:, :, None], jnp.abs(hidden_units(probes, weights)), 0.0)
        best, _ = jax.lax.top_k(hidden.sum(axis=1), units + 1)
        return 1 - best[:, units] / best[:, units - 1]

    for batch in split.batches:
        inputs = batch.inputs
        context = decoder.context(inputs.layout, inputs.rope_positions, jax.random.key(0))
        x = decoder.embed(inputs.text_ids, batch.visual)
        numbers = np.asarray(inputs.samples)[:, 0]
        real = numbers != FILLER
        for layer in range(decoder.config.num_layers):
            module = nnx.merge(graph, jax.tree.map(lambda p, layer=layer: p[layer], stack))
            x, _, _ = module.attend(x, context, reduction, plan.level("attention", layer))
            if layer in plan.ffn:
                measured = np.asarray(gap(module.ffn_norm(x), module.ffn.weights, inputs.layout))
                gaps[numbers[real]] = np.minimum(gaps[numbers[real]], measured[real])
            x, _ = module.feed(x, context, reduction, plan.level("ffn", layer), jnp.int32(layer))
        answers = jnp.take_along_axis(x, inputs.answer_slots[:, :, None], axis=1)
        best, _ = jax.lax.top_k(decoder.logits(answers), 2)
        lead = np.where(np.asarray(inputs.answer_targets) != IGNORE, best[:, :, 0] - best[:, :, 1], np.inf)
        margins[numbers[real]] = lead.min(axis=1)[real]
    return {"logit_margin": margins, "unit_gap": gaps}


if __name__ == "__main__":
    main()
