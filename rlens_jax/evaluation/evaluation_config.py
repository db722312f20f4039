"""The configuration of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, no_type_check

from rlens_jax.errors import UserError
from rlens_jax.plan_file import PlanFile


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class EvaluationConfig:
    """An evaluation run.

    Attributes:
        model: a folder, or "embedded".
        plan: which layers are reduced, and how.
        data: sources as of `evaluation.datasets.load_datasets`.
        output: folder of answers, predictions and results.
        baseline: also evaluate the dense model, and report the differences.
        limit: use at most this many questions of each dataset, the first ones.
        md5: MD5 sums of TSV files that are not the published ones, by dataset.
        max_new_tokens: maximum length of an answer.
        batch_size: prompts per batch of a work group.
        dtype: type of weights and computation.
        chunk: tokens of a prompt per FFN call; None chooses by size.
        model_shards: devices that share a copy of the model.
        seed: seed of random probes and the bootstrap.
        bootstrap_samples: draws for the 95 % intervals.
        timing_repeats: measurements per program; 0 measures nothing.

    Raises:
        UserError: an option is out of range.
    """

    model: str
    plan: PlanFile
    data: tuple[str, ...]
    output: Path
    baseline: bool = False
    limit: int | None = None
    md5: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 512
    batch_size: int = 8
    dtype: str = "float32"
    chunk: int | None = None
    model_shards: int = 1
    seed: int = 0
    bootstrap_samples: int = 1000
    timing_repeats: int = 5

    def __post_init__(self) -> None:
        least = {"seed": 0, "timing_repeats": 0}
        for name in (
            "limit", "max_new_tokens", "batch_size", "chunk", "model_shards", "seed", "bootstrap_samples", "timing_repeats"
        ):  # fmt: skip
            value, bound = getattr(self, name), least.get(name, 1)
            if value is not None and value < bound:
                raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, not {value}")

    @property
    def variants(self) -> dict[str, PlanFile]:
        """The plans to evaluate, by name."""
        dense = {"dense": PlanFile()} if self.baseline else {}
        return {**dense, "plan": self.plan}

    def settings(self) -> dict[str, Any]:
        """The settings that determine answers, as JSON values. The mesh is left out: it changes rounding at most."""
        names = ("max_new_tokens", "batch_size", "dtype", "chunk", "seed")
        return {"plan": self.plan.fields(), **{name: getattr(self, name) for name in names}}
