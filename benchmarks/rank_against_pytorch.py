"""Time the layer ranking of a plain PyTorch loop and of rlens_jax, and check that both find the same ranking.

    python benchmarks/rank_against_pytorch.py [--samples 120] [--operators attention,ffn] [--switches] [--json FILE]

The task: the embedded model and its pages, 3 datasets with --samples validation samples each, 4 questions about each image.

The loop in PyTorch is what a user would write with the Hugging Face model: every candidate is a full forward pass over all
samples in batches of 16 questions, teacher forced, in evaluation mode, without gradients, with SDPA, on all cores. Inputs are
prepared once, before the time begins. Hollow Attention is a dense mask, made once per batch. The Dynamic FFN computes visual
tokens on the selected units only, for a whole batch at once.

The time of rlens_jax is that of `python -m rlens_jax.rank --report none` in a new process, with an empty compilation cache: from
the vision tower to the last ranking, compilation included. The whole command, with imports and data, is printed beside it.
The two run one after the other on the same machine. --switches also times rlens_jax without each idea.

Expect identical orders, ties included, and a ratio of at least 10 on two CPU cores, in about 12 minutes.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from rlens_jax.data.page_samples import read_pages
from rlens_jax.data.samples import Sample
from rlens_jax.resources import embedded_model

BATCH = 16
ATTENTION_RANGE, UNITS, PROBES, PENALTY = 16, 8, 12, 2.0
"""Of configs/embedded.yaml: 2 % of 384 units, a tenth of 128 visual tokens."""
SWITCHES = {
    "everything on": [],
    "without sharing": ["--compute.sharing=false"],
    "without early stopping": ["--search.stopping=none"],
    "without both": ["--compute.sharing=false", "--search.stopping=none"],
}


@dataclass
class Batch:
    """Model inputs of a batch, and what the reductions and the check of its answers need."""

    inputs: dict[str, Tensor]
    visual: slice
    """The visual tokens, at the same places in all samples."""
    hollow: Tensor
    """bool [B, 1, T, T]: which keys (columns) a query (row) sees in a reduced layer."""
    answers: list[tuple[str, slice, Tensor]]
    """Per sample: its dataset, the positions before each answer token, and these tokens."""


def make_batch(samples: list[Sample], processor: Any, image_token: int) -> Batch:
    """Prompts with their answers and the end of the turn, padded on the right."""
    images = [Image.open(BytesIO(sample.images[0])) for sample in samples]
    texts, prompts = [], []
    for sample in samples:
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        prompts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        texts.append(f"{prompts[-1]}{sample.answers[0]}<|im_end|>")
    pairs = zip(prompts, images, strict=True)
    lengths = [len(processor(text=[prompt], images=[image])["input_ids"][0]) for prompt, image in pairs]
    inputs = dict(processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"))
    ids, used = inputs["input_ids"], inputs["attention_mask"].bool()
    is_visual = ids == image_token
    if not bool((is_visual == is_visual[0]).all()):
        raise ValueError("the samples of a batch have their visual tokens at different places")
    places = is_visual[0].nonzero()[:, 0]
    near = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    ordinal = is_visual[0].cumsum(0)
    far = (ordinal[:, None] - ordinal[None] >= ATTENTION_RANGE) & is_visual[0][:, None] & is_visual[0][None]
    answers = []
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        end = int(used[row].sum())
        answers.append((sample.dataset, slice(length - 1, end - 1), ids[row, length:end]))
    visual = slice(int(places[0]), int(places[-1]) + 1)
    return Batch(inputs, visual, (near & ~far)[None, None] & used[:, None, None], answers)


class TorchLoop:
    """The search as a user would write it."""

    def __init__(self, samples: list[Sample]):
        folder = embedded_model()
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()
        processor = AutoProcessor.from_pretrained(folder)
        parts = (samples[first : first + BATCH] for first in range(0, len(samples), BATCH))
        self.batches = [make_batch(part, processor, self.model.config.image_token_id) for part in parts]
        self.batch = self.batches[0]
        self.layers = self.model.model.language_model.layers
        self.evaluations = 0

    @torch.no_grad()
    def accuracies(self, plan: dict[str, list[int]]) -> dict[str, float]:
        """The share of right answers of each dataset under a plan."""
        attentions = [self.layers[layer].self_attn for layer in plan["attention"]]
        undo = [attention.register_forward_pre_hook(self.hollow, with_kwargs=True) for attention in attentions]
        for layer in plan["ffn"]:
            mlp = self.layers[layer].mlp
            mlp.forward = lambda x, mlp=mlp: self.dynamic(mlp, x)
        right: dict[str, list[bool]] = {}
        for batch in self.batches:
            self.batch = batch
            best = self.model(**batch.inputs).logits.argmax(-1)
            for row, (dataset, places, tokens) in enumerate(batch.answers):
                right.setdefault(dataset, []).append(bool((best[row, places] == tokens).all()))
        for hook in undo:
            hook.remove()
        for layer in plan["ffn"]:
            del self.layers[layer].mlp.forward
        self.evaluations += 1
        return {dataset: math.fsum(values) / len(values) for dataset, values in right.items()}

    def hollow(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A hook that gives an attention its mask."""
        return arguments, named | {"attention_mask": self.batch.hollow}

    def dynamic(self, mlp: Any, x: Tensor) -> Tensor:
        """The FFN with only the units of each sample's probes for its visual tokens; x is [B, T, D]."""
        start, stop = self.batch.visual.start, self.batch.visual.stop
        seen, count = x[:, self.batch.visual], stop - start
        probes = seen[:, torch.arange(PROBES) * count // PROBES]
        scores = (functional.silu(mlp.gate_proj(probes)) * mlp.up_proj(probes)).abs().mean(1)
        units = scores.sort(dim=1, descending=True, stable=True).indices[:, :UNITS]
        gate, up, down = mlp.gate_proj.weight[units], mlp.up_proj.weight[units], mlp.down_proj.weight.T[units]
        hidden = functional.silu(seen @ gate.transpose(1, 2)) * (seen @ up.transpose(1, 2))
        text = torch.cat((x[:, :start], x[:, stop:]), 1)
        text = mlp.down_proj(functional.silu(mlp.gate_proj(text)) * mlp.up_proj(text))
        return torch.cat((text[:, :start], hidden @ down, text[:, start:]), 1)

    def rank(self, operator: str, dense: dict[str, float]) -> dict[str, Any]:
        """The order of all layers, and the tied layers of each round."""

        def score(layers: list[int]) -> float:
            metrics = self.accuracies({"attention": [], "ffn": [], operator: layers})
            changes = [(metrics[name] - value) / value for name, value in dense.items()]
            return round(math.fsum(change if change >= 0 else PENALTY * change for change in changes), 12)

        num_layers, order, ties, scores = len(self.layers), [], [], []
        for layer in range(num_layers - 1, num_layers - 1 - num_layers // 4, -1):
            order.append(layer)
            scores.append(score(order))
        while len(order) < num_layers:
            found = {layer: score([*order, layer]) for layer in range(num_layers) if layer not in order}
            best = max(found.values())
            *tied, chosen = (layer for layer, value in found.items() if value == best)
            order.append(chosen)
            ties.append(tied)
            scores.append(best)
            print(f"  {operator}: layer {chosen}, score {best:.4f}", flush=True)
        return {"order": order, "ties": ties, "scores": scores}


def run_torch(samples: list[Sample], operators: list[str]) -> dict[str, Any]:
    """The rankings of the loop, and its seconds."""
    loop = TorchLoop(samples)
    loop.accuracies({"attention": [], "ffn": []})  # PyTorch's first pass is slower
    began = time.perf_counter()
    dense = loop.accuracies({"attention": [], "ffn": []})
    rankings = {operator: loop.rank(operator, dense) for operator in operators}
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "evaluations": loop.evaluations - 1, "threads": torch.get_num_threads(), "rankings": rankings}


def run_ours(options: list[str]) -> dict[str, Any]:
    """The rankings of rlens_jax, and its seconds: from the vision tower on, and of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlens_jax.rank", f"--output={folder}/run", "--report=none", *options]
        began = time.perf_counter()
        subprocess.run([*command, f"--compute.compilation_cache={folder}/compiled"], check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - began
        ranking = json.loads(Path(folder, "run", "ranking.json").read_text())
        phases = json.loads(Path(folder, "run", "timing.json").read_text())["seconds"]
    rankings = {
        operator: {
            "order": ranking["rankings"][operator],
            "ties": [round_["ties"] for round_ in search["rounds"]],
            "scores": [round(score, 12) for score in search["scores"][1:]],
        }
        for operator, search in ranking["search"].items()
    }
    return {"seconds": phases["encode"] + phases["search"], "whole": whole, "phases": phases, "rankings": rankings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=120, help="validation samples per dataset")
    parser.add_argument("--operators", default="attention,ffn", help="operators to rank")
    parser.add_argument("--switches", action="store_true", help="also time rlens_jax without each idea")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    operators = options.operators.split(",")
    samples = [sample for own in read_pages("validation", options.samples).values() for sample in own]
    print(f"{len(samples)} samples about {len({sample.images for sample in samples})} images, {os.cpu_count()} cores")
    theirs = run_torch(samples, operators)
    print(f"PyTorch                 {theirs['seconds']:7.1f} s  {theirs['evaluations']} evaluations of all samples")
    common = [
        f"--data.validation_samples={options.samples}",
        "--data.confirmation_samples=0",
        f"--search.operators={options.operators}",
    ]
    ours = {}
    for name, switch in SWITCHES.items() if options.switches else [("everything on", [])]:
        ours[name] = run_ours([*common, *switch])
        same = ours[name]["rankings"] == theirs["rankings"]
        print(
            f"{name:<24}{ours[name]['seconds']:7.1f} s  {theirs['seconds'] / ours[name]['seconds']:5.1f} times as fast; "
            f"whole command {ours[name]['whole']:.1f} s; rankings {'identical' if same else 'DIFFERENT'}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"samples": len(samples), "pytorch": theirs, "rlens_jax": ours}, indent=1) + "\n")
    if any(result["rankings"] != theirs["rankings"] for result in ours.values()):
        sys.exit("the rankings differ")


if __name__ == "__main__":
    main()
