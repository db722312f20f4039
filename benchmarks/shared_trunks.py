"""Measure what questions about one image save by sharing a row: FLOPs, and the time of the prefill and of whole answers.

    python benchmarks/shared_trunks.py [--images 16] [--questions 6] [--repeats 5] [--json FILE]

The embedded model answers drawn questions about drawn pages, dense, in a row for each image and in a row for each question. Both
take turns, and medians are compared. Answers must be equal. "answers" is the time from image files to texts.

Expect ratios of 0.24 (FLOPs), 0.21 (prefill) and 0.42 (answers) with 6 questions an image, and about a minute.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from PIL import Image

from rlens_jax.data.pages import DATASETS, make_page, make_question
from rlens_jax.data.samples import Sample
from rlens_jax.engine.deployed_model import DeployedModel, load
from rlens_jax.engine.prompt_batches import AskedPrompts
from rlens_jax.engine.timing import time_side_by_side
from rlens_jax.families.generation_config import Decoding
from rlens_jax.flops import shared_prefill_cost
from rlens_jax.plan_file import PlanFile
from rlens_jax.plans import Plan, Reduction

NEW_TOKENS = 8
SHARED, ALONE = "a row for each image", "a row for each question"
WAYS = {SHARED: True, ALONE: False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="images")
    parser.add_argument("--questions", type=int, default=6, help="questions about each")
    parser.add_argument("--repeats", type=int, default=5, help="measurements")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    model, samples = load("embedded"), drawn_samples(options.images, options.questions)
    ways = {name: model.prepare(samples, Decoding(NEW_TOKENS), sharing=sharing) for name, sharing in WAYS.items()}
    answers = {name: texts(model, asked) for name, asked in ways.items()}
    if answers[SHARED] != answers[ALONE]:
        sys.exit("the answers differ")
    costs = {name: multiply_adds(model, asked) for name, asked in ways.items()}
    calls: dict[str, Callable[[], Any]] = {f"prefill, {name}": partial(prefills, model, asked) for name, asked in ways.items()}
    for name, sharing in WAYS.items():
        calls[f"answers, {name}"] = partial(answered, model, samples, sharing)
    measured = dict(zip(calls, time_side_by_side(list(calls.values()), options.repeats), strict=True))
    seconds = {name: median(values) for name, values in measured.items()}
    ratios = {"FLOPs": costs[SHARED] / costs[ALONE]}
    ratios |= {part: seconds[f"{part}, {SHARED}"] / seconds[f"{part}, {ALONE}"] for part in ("prefill", "answers")}
    print(f"{len(samples)} questions about {options.images} images; all answers are equal")
    for name, cost in costs.items():
        print(f"{name:<34}{cost / 1e6:9.1f} million multiply-adds per question")
    for name, value in seconds.items():
        print(f"{name:<34}{value * 1e3:9.1f} ms")
    print("ratios: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    if options.json:
        device = jax.devices()[0].device_kind
        result = {"multiply_adds": costs, "seconds": measured, "ratios": ratios, "device": device, "cores": os.cpu_count()}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def drawn_samples(images: int, questions: int) -> list[Sample]:
    """Questions about pages, no two of a page equal."""
    rng, samples = np.random.default_rng(0), []
    for number in range(images):
        page, buffer = make_page(rng, "test", augment=False), io.BytesIO()
        Image.fromarray(page.pixels).save(buffer, "PNG")
        drawn: set[str] = set()
        while len(drawn) < questions:
            drawn.add(make_question(rng, page, DATASETS[len(drawn) % len(DATASETS)]).text)
        samples += [Sample(f"{number}: {text}", "pages", (buffer.getvalue(),), text, ()) for text in sorted(drawn)]
    return samples


def prefills(model: DeployedModel, asked: AskedPrompts) -> list[Any]:
    """The first token of every prompt."""
    put, prefill = model.programs.put, model.programs.prefill
    return [prefill(put(batch.visual), batch.inputs, PlanFile(), NEW_TOKENS).first for batch in asked.batches]


def texts(model: DeployedModel, asked: AskedPrompts) -> dict[int, str]:
    """The answer to each question."""
    return {
        number: answer.text
        for batch in asked.batches
        for number, answer in model.answer_batch(asked, batch, PlanFile(), Decoding(NEW_TOKENS))[0].items()
    }


def answered(model: DeployedModel, samples: Sequence[Sample], sharing: bool) -> dict[int, str]:
    """The answer to each question, from the beginning."""
    return texts(model, model.prepare(samples, Decoding(NEW_TOKENS), sharing=sharing))


def multiply_adds(model: DeployedModel, asked: AskedPrompts) -> float:
    """Of the dense prefill, without padding, per question."""
    sizes, layers = model.programs.config.layer_sizes, model.programs.config.num_layers
    costs = [
        shared_prefill_cost(
            sizes,
            size.text,
            [size.visual] * layers,
            Plan(),
            Reduction(),
            trunk_text=size.trunk_text,
            sharers=size.sharers,
            with_probes=False,
        )
        for size in asked.sizes
    ]
    return sum(costs) / len(costs)


if __name__ == "__main__":
    main()
