"""The configuration of an evaluation, its results as values, and the text of its files.

`evaluation.json`, which `evaluation.schema.json` describes, holds nothing that differs between runs of a configuration.
`timing.json` holds the measured times.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, no_type_check

from rlens_jax.config import LIMITS, Dtype
from rlens_jax.data.images import Transparency
from rlens_jax.engine.preparing import Resize, as_it_is
from rlens_jax.errors import UserError, suggest
from rlens_jax.evaluation.profiles import Entry, Manner, check_profile, find_entry
from rlens_jax.metrics.score import CURRENT, RULES, Score
from rlens_jax.plan_file import PlanFile
from rlens_jax.search.bootstrap import Interval

BenchmarkImages = Literal["as_published", "recompressed"]
"""See `data.images.recompressed`."""

SCHEMA = "rlens-evaluation/1"
TIMING_SCHEMA = "rlens-evaluation-timing/1"
NEW_TOKENS = 512
"""Default max length of an answer, where the checkpoint says none."""


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class EvaluationConfig:
    """An evaluation run.

    Attributes:
        model: a folder, "embedded", or a name on the Hugging Face hub.
        plan: which layers are reduced, and how.
        data: sources as of `evaluation.datasets.load_datasets`.
        output: folder of answers, predictions and results.
        baseline: also evaluate the dense model, and report the differences.
        limit: use at most this many questions of each dataset, the first ones.
        md5: MD5 sums of TSV files that are not the published ones, by dataset.
        max_new_tokens: maximum length of an answer; None is the checkpoint's, or else `NEW_TOKENS`.
        repetition_penalty: None is the checkpoint's; 1 applies none.
        profile: another harness' settings by name, for what is not given here; see `evaluation.profiles`.
        system: the system prompt; None leaves it to the profile, or else to the chat template.
        min_pixels, max_pixels, max_tiles, total_tiles, max_slices: limits of the sizes of images, as in `config.LIMITS`;
            None leaves them to the profile, or else to the checkpoint.
        batch_size: prompts per batch of a work group.
        dtype: type of weights and computation; None means bfloat16 on an accelerator and float32 on a CPU.
        chunk: tokens of a prompt per FFN call; None chooses by size.
        model_shards: devices that share a copy of the model.
        sharing: questions about the same images share what is computed for these, unless a plan prunes visual tokens.
        seed: seed of random probes and the bootstrap.
        rules: the rules of benchmarks, a key of `metrics.score.RULES`.
        images: of benchmarks, "as_published" in the TSV file, or "recompressed" as VLMEvalKit did before 2026-02-19.
        bootstrap_samples: draws for the 95 % intervals.
        timing_repeats: measurements per program; 0 measures nothing.
        skip_unusable: go on where a question cannot be asked, and count it as wrong.
        restart: rename the answers of another configuration in `output`, and start again.

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
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None
    profile: str | None = None
    system: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None
    total_tiles: int | None = None
    max_slices: int | None = None
    batch_size: int = 8
    dtype: Dtype | None = None
    chunk: int | None = None
    model_shards: int = 1
    sharing: bool = True
    seed: int = 0
    rules: str = CURRENT
    images: BenchmarkImages = "as_published"
    bootstrap_samples: int = 1000
    timing_repeats: int = 5
    skip_unusable: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        positive = ("limit", "max_new_tokens", "batch_size", "chunk", "model_shards", "bootstrap_samples", *LIMITS)
        for name, bound in {**dict.fromkeys(positive, 1), "seed": 0, "timing_repeats": 0}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, not {value}")
        if (penalty := self.repetition_penalty) is not None and not 0 < penalty < float("inf"):
            raise UserError(f"--repetition-penalty must be a positive number, not {penalty}")
        if self.profile is not None:
            check_profile(self.profile)
        if self.rules not in RULES:
            raise UserError(
                f"--rules {self.rules}: there are no such rules{suggest(self.rules, RULES)}; known: {', '.join(RULES)}"
            )

    def entry(self, model_type: str, dataset: str) -> Entry:
        """What is asked otherwise than a checkpoint of this type says, on a dataset: what is given, else what the profile says.

        Raises:
            UserError: the profile does not know the model.
        """
        known = Entry() if self.profile is None else find_entry(self.profile, model_type, dataset)
        limits = {name: value for name in LIMITS if (value := getattr(self, name)) is not None}
        names = ("max_new_tokens", "repetition_penalty", "system")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(known, limits={**known.limits, **limits}, **given)

    @property
    def variants(self) -> dict[str, PlanFile]:
        """The plans to evaluate, by name."""
        dense = {"dense": PlanFile()} if self.baseline else {}
        return {**dense, "plan": self.plan}

    @property
    def asking(self) -> "Asking":
        """How the questions are asked."""
        return Asking(self.variants, self.sharing, self.batch_size, self.skip_unusable)

    def settings(self) -> dict[str, Any]:
        """The settings that determine answers, as JSON values. The mesh is left out: it changes rounding at most."""
        names = ("max_new_tokens", "repetition_penalty", "profile", "system", *LIMITS)
        names = (*names, "batch_size", "dtype", "chunk", "sharing", "seed")
        return {"plan": self.plan.fields(), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Asking:
    """How questions are asked under some plans.

    Attributes:
        variants: the plans, by name.
        sharing: questions about the same images share what is computed for these, unless a plan prunes visual tokens.
        batch_size, skip_unusable: as in `EvaluationConfig`.
        resized: what the model gets in place of an image.
        described: an addition to the label of the progress.
    """

    variants: Mapping[str, PlanFile]
    sharing: bool
    batch_size: int
    skip_unusable: bool
    resized: Resize = as_it_is
    described: str = ""

    @property
    def shares(self) -> bool:
        """Whether questions share rows. Pruning keeps other visual tokens for each question."""
        return self.sharing and all(plan.pruning is None for plan in self.variants.values())

    @property
    def marked(self) -> bool:
        """Whether a plan needs marks behind the visual tokens; the others may have them."""
        return any(plan.marked for plan in self.variants.values())


@dataclass(frozen=True)
class VariantResult:
    """The result of one variant on a dataset."""

    score: Score | None
    """The score by the dataset's rules; None if its answers are withheld."""
    interval: Interval | None
    """The 95 % bootstrap interval of the score."""
    unended: int
    """Number of answers that reached the maximum length before the model ended its turn."""


@dataclass(frozen=True)
class SharedCost:
    """As computed: what several questions share counts once for all of them."""

    dense: float
    reduced: float
    reduced_with_probes: float


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the decoder layers in the prefill, means over the questions.

    They are for each question alone, except those of `shared`. `saved` and `saved_with_probes` are shares of the dense cost.
    """

    dense: float
    reduced: float
    reduced_with_probes: float
    selection: float
    """Of choosing or merging the visual tokens that stay; contained in no other number."""
    saved: float
    saved_with_probes: float
    shared: SharedCost


@dataclass(frozen=True)
class ImageReading:
    """How the images of a dataset were read; see `data.images`."""

    upright: bool
    """Whether the EXIF orientation was applied."""
    transparency: Transparency


@dataclass(frozen=True)
class DatasetResult:
    """The results of all variants on a dataset."""

    digest: str
    """Hash of the questions."""
    questions: int
    unusable: int
    """Number of questions that could not be asked, which are wrong; tokens and cost are means over the others."""
    per_image: float
    """Mean number of questions about the same images."""
    images: ImageReading
    text_tokens: float
    """Mean text tokens per prompt."""
    visual_tokens: float
    """Mean visual tokens per prompt."""
    kept_tokens: float
    """Mean visual tokens in the last layer under the plan."""
    mean_tokens: float
    """Mean visual tokens that enter a layer under the plan, over layers and prompts."""
    manner: Manner
    """How its questions were asked and answered."""
    cost: Cost
    """Cost of the plan."""
    variants: Mapping[str, VariantResult]
    """Results of "plan", and of "dense" with a baseline."""
    difference: Interval | None
    """Score of the plan minus score of the dense model, with the interval of paired draws."""


@dataclass(frozen=True)
class VariantTime:
    """Measured seconds of one variant, one entry per repeat."""

    prefill: tuple[float, ...]
    """The decoder's prefill of a batch, up to the first new token."""
    first_token: tuple[float, ...]
    """From image files and texts to the first new token: image decoding, preprocessing, vision tower, prefill."""
    decode: tuple[float, ...]
    """The decoding steps after the first token."""


@dataclass(frozen=True)
class Times:
    """Measured times of both variants on one batch."""

    rows: int
    """Rows of the batch, including filler rows."""
    branches: int
    """Places for prompts in a row."""
    prompts: int
    """Prompts in the batch."""
    text_slots: int
    visual_slots: int
    dense: VariantTime
    plan: VariantTime
    decode_steps: int
    """Number of timed decoding steps."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation. `times` is None if nothing was timed."""

    config: EvaluationConfig
    model_hash: str
    model_type: str
    num_layers: int
    device: str
    versions: Mapping[str, str]
    datasets: Mapping[str, DatasetResult]
    times: Times | None
    not_applied: Sequence[str]
    """What the checkpoint asks for that greedy decoding does not do, in words."""


def evaluation_fields(result: Evaluation) -> dict[str, Any]:
    """The fields of evaluation.json."""
    config = result.config
    return {
        "schema": SCHEMA,
        "model": {
            "path": config.model,
            "hash": result.model_hash,
            "model_type": result.model_type,
            "num_layers": result.num_layers,
            "not_applied": list(result.not_applied),
        },
        "plan": {"label": config.plan.label(), **config.settings()["plan"]},
        "datasets": {name: _dataset(name, part) for name, part in result.datasets.items()},
        "configuration": {
            **config.settings(),
            "data": list(config.data),
            "limit": config.limit,
            "skip_unusable": config.skip_unusable,
            "rules": config.rules,
            "images": config.images,
            "bootstrap_samples": config.bootstrap_samples,
        },
        "device": result.device,
        "versions": dict(result.versions),
    }


def timing_fields(times: Times) -> dict[str, Any]:
    """The fields of timing.json."""
    fields = dataclasses.asdict(times)
    for name, variant in (("dense", times.dense), ("plan", times.plan)):
        fields[name]["tokens_per_second"] = tokens_per_second(times, variant)
    return {"schema": TIMING_SCHEMA, **fields}


def tokens_per_second(times: Times, variant: VariantTime) -> float:
    """New tokens of all places per second, from the median decoding time; prefill not counted."""
    return times.rows * times.branches * times.decode_steps / median(variant.decode)


def summary(result: Evaluation) -> str:
    """The text for the terminal."""
    lines = [f"{result.config.model}, plan: {result.config.plan.label()}"]
    if result.not_applied:
        lines.append(f"answers are greedy, without what the checkpoint asks for: {', '.join(result.not_applied)}")
    for name, part in result.datasets.items():
        lines.append(
            f"{name}: {part.questions} questions, FLOPs saved {part.cost.saved:.1%} "
            f"({part.cost.saved_with_probes:.1%} with probes)"
        )
        if part.per_image > 1 and result.config.asking.shares:
            shared = part.cost.shared.reduced / part.cost.reduced
            lines.append(f"  {part.per_image:.1f} questions an image share its prefill: {shared:.1%} of the FLOPs of each alone")
        if result.config.plan.pruning is not None:
            lines.append(
                f"  of {part.visual_tokens:.1f} visual tokens {part.kept_tokens:.1f} are kept, {part.mean_tokens:.1f} a layer; "
                f"choosing them takes {part.cost.selection / part.cost.dense:.2%} of the dense FLOPs in addition"
            )
        if notes := part.manner.entry.not_reproduced:
            lines.append(f"  not as in {result.config.profile}: {'; '.join(notes)}")
        if part.unusable:
            lines.append(f"  {part.unusable} of them could not be asked and count as wrong")
        for variant, scored in part.variants.items():
            unended = f", {scored.unended} answers cut off" if scored.unended else ""
            if scored.score is None or scored.interval is None:
                lines.append(f"  {variant:<6} not scored here: the answers are withheld{unended}")
            else:
                low, high = scored.interval.low, scored.interval.high
                lines.append(
                    f"  {variant:<6}{scored.score.value:8.2f} {scored.score.unit}  [{low:.2f}, {high:.2f}]  "
                    f"({scored.score.harness}){unended}"
                )
        if part.difference is not None:
            change = part.difference
            lines.append(f"  change{change.value:+8.2f}  [{change.low:+.2f}, {change.high:+.2f}]")
    if (times := result.times) is not None:
        lines.append(
            f"times of {times.prompts} prompts in {times.text_slots} + {times.visual_slots} slots, medians, dense -> plan:"
        )
        for label, field in (("prefill", "prefill"), ("to first token", "first_token")):
            dense, plan = median(getattr(times.dense, field)), median(getattr(times.plan, field))
            lines.append(f"  {label:<15}{dense * 1e3:10.1f} ms -> {plan * 1e3:10.1f} ms ({1 - plan / dense:+.1%} saved)")
        rates = [tokens_per_second(times, variant) for variant in (times.dense, times.plan)]
        lines.append(f"  {'decoding':<15}{rates[0]:10.1f} -> {rates[1]:10.1f} tokens/s")
    return "\n".join(lines)


def _dataset(name: str, part: DatasetResult) -> dict[str, Any]:
    return {
        "digest": part.digest,
        "questions": part.questions,
        "unusable": part.unusable,
        "questions_per_image": part.per_image,
        "images": dataclasses.asdict(part.images),
        "text_tokens": part.text_tokens,
        "visual_tokens": part.visual_tokens,
        "kept_visual_tokens": part.kept_tokens,
        "mean_visual_tokens": part.mean_tokens,
        "asked": part.manner.fields(),
        "multiply_adds": dataclasses.asdict(part.cost),
        "variants": {
            variant: {
                "predictions": f"{variant}/{name}.tsv",
                "unended": scored.unended,
                "score": None if scored.score is None else _score(scored.score, scored.interval),
            }
            for variant, scored in part.variants.items()
        },
        "difference": None if part.difference is None else part.difference.fields(),
    }


def _score(score: Score, interval: Interval | None) -> dict[str, Any]:
    assert interval is not None
    return {**interval.fields(), "unit": score.unit, "harness": score.harness, "breakdown": dict(score.breakdown)}
