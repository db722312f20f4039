"""Measure the embedded model: `python -m rlens_jax.demo.measure [MODEL] [--samples 200] [--json FILE]`.

For held-out samples of each dataset of pages: exact match (teacher forced, equal to greedy decoding), exact match with the image
of another sample, the share of the most frequent answer, and exact match without each single layer. They show whether the model
reads its images and needs its layers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlens_jax.console import ArgumentParser, Progress, run_command
from rlens_jax.data.pages import DATASETS
from rlens_jax.files import json_text

PATCH_SLOTS, TEXT_SLOTS, VISUAL_SLOTS, BATCH = 512, 48, 128, 16


def measure(model: str, samples: int) -> dict[str, Any]:
    """Measure a model; returns the content of the JSON file.

    Args:
        model: a model folder, or "embedded".
        samples: number of held-out samples per dataset.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from rlens_jax.checkpoints.checkpoint import load_model
    from rlens_jax.checkpoints.model_folder import find_model
    from rlens_jax.data.page_samples import read_pages
    from rlens_jax.engine.inputs import Split, build_split
    from rlens_jax.engine.programs import Programs
    from rlens_jax.engine.shapes import Shapes, row_buckets
    from rlens_jax.models.prompt import FILLER
    from rlens_jax.plans import Plan, Reduction
    from rlens_jax.sharding.mesh import make_mesh

    folder = find_model(model)
    mesh = make_mesh(jax.devices()[:1], 1)
    kind, loaded = load_model(folder, jnp.dtype("float32"), mesh=mesh)
    preparer = kind.preparer(folder)
    programs = Programs(loaded, mesh, Reduction(), seed=0, new_tokens=1, stop_tokens=preparer.chat.stop_tokens)
    num_layers = kind.config.decoder.num_layers

    def accuracies(split: Split, what: str, skipped: Sequence[int]) -> list[dict[str, float]]:
        """Accuracy of the whole model, then without each of the `skipped` layers, from the states in front of it."""
        outcomes = np.zeros((1 + len(skipped), len(split.samples)))
        with Progress(what, len(split.batches), "batches") as bar:
            for batch in split.batches:
                states = [programs.embed(batch.inputs.text_ids, batch.visual)]
                for layer in range(num_layers):
                    states.append(programs.layers(states[-1], batch.inputs, Plan(), layer, layer + 1))
                without = (programs.layers(states[k], batch.inputs, Plan(), k + 1, num_layers) for k in skipped)
                for right_of, last in zip(outcomes, (states[-1], *without), strict=True):
                    numbers, right, *_ = (np.asarray(part) for part in programs.outcome(last, batch.inputs))
                    right_of[numbers[numbers != FILLER]] = right[numbers != FILLER]
                bar.advance()
        return [{name: float(row[members].mean()) for name, members in split.datasets.items()} for row in outcomes]

    shapes = Shapes(row_buckets((TEXT_SLOTS,), (VISUAL_SLOTS,)), ((PATCH_SLOTS,),), kind.image_arrays, BATCH)
    by_dataset = read_pages("test", samples).values()
    # A page has at most two successive questions of a dataset, so the next but one is about another page.
    pairs = [pair for rows in by_dataset for pair in zip(rows, [*rows[2:], *rows[:2]], strict=True)]
    sources = [sample for sample, _ in pairs], [replace(sample, images=other.images) for sample, other in pairs]
    plain, swapped = (build_split(source, preparer, programs, shapes, True) for source in sources)
    dense, *without_layer = accuracies(plain, "with and without each layer", range(num_layers))
    results: dict[str, Any] = {
        "schema": "rlens-embedded/1",
        "samples": {name: len(members) for name, members in plain.datasets.items()},
        "accuracy": {**dense, "overall": sum(dense.values()) / len(dense)},
        "swapped_images": accuracies(swapped, "with swapped images", ())[0],
        "commonest_answer": {
            name: max(Counter(plain.samples[i].answers[0] for i in members).values()) / len(members)
            for name, members in plain.datasets.items()
        },
        "visual_share": float(np.min(plain.num_visual / (plain.num_visual + plain.num_text))),
        "without_layer": [{**values, "overall": sum(values.values()) / len(values)} for values in without_layer],
    }
    return results


def main(arguments: Sequence[str]) -> None:
    """Parse options, measure, print."""
    parser = ArgumentParser("python -m rlens_jax.demo.measure", __doc__)
    parser.add_argument("model", nargs="?", default="embedded", help="model folder")
    parser.add_argument("--samples", type=int, default=200, help="number of held-out samples per dataset")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    results = measure(options.model, options.samples)
    for name in DATASETS:
        print(
            f"{name:<14} exact match {results['accuracy'][name]:6.1%}   images swapped {results['swapped_images'][name]:6.1%}"
            f"   commonest answer {results['commonest_answer'][name]:6.1%}"
        )
    overall, share = results["accuracy"]["overall"], results["visual_share"]
    print(f"overall        exact match {overall:6.1%}   visual tokens at least {share:.1%} of a prompt with its answer")
    for layer, without in enumerate(results["without_layer"]):
        print(f"without layer {layer:<2} {without['overall']:6.1%}  ({without['overall'] - overall:+.1%})")
    if options.json:
        options.json.write_text(json_text(results), encoding="utf-8")


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
