"""Images and prompts of a Qwen3-VL checkpoint: prepared as those of Qwen2-VL, with its own limits and benchmark prompts."""

from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, Instance, Turn, is_choice, question_and_options
from rlens_jax.families.qwen3_vl.model import Qwen3VLConfig

PUBLISHED_PIXELS = {"shortest_edge": 256**2, "longest_edge": 4096**2}
"""Least and most pixels of an image after resizing in the published checkpoints' file; they are no edges."""
LETTER = "Answer with the option letter only."
SHORT = "Please answer concisely with short words or phrases when possible."


def benchmark_prompt(instance: Instance, config: Qwen3VLConfig, step_by_step: bool) -> Turn:
    """The prompts of VLMEvalKit's vlm/qwen3_vl/prompt.py; it has none that ask for steps."""
    if is_choice(instance):
        return Turn(question_and_options(instance) + LETTER)
    if BENCHMARKS[instance.dataset].task == "yes_no":
        return Turn(f"{instance.question} Please answer yes or no.")
    return Turn(f"{instance.question}\n{SHORT}")
