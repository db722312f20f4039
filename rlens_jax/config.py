"""The configuration of a run, as frozen dataclasses that check their own values.

Error messages name the field. Paths are not checked here: the code that opens a file reports what is wrong with it.
"""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin, no_type_check

from rlens_jax.budget import parse_budget
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import check_local, quoted
from rlens_jax.mirrors import place
from rlens_jax.plans import FULL, OPERATORS, SKIP, Levels, Operator, Plan, Reduction, parse_level

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
FfnPath = Literal["auto", "gathered", "masked", "kernel"]
"""How the visual tokens of a layer with the Dynamic FFN go through its units; `rlens_jax.ops.ffn_paths` has them all."""
PAGES = "pages"
MAX_SEEN = 6
"""Most samples whose pictures a report holds."""
"""The data source of the embedded model."""

LIMITS: Mapping[str, str] = MappingProxyType(
    {
        "min_pixels": "least pixels of an image after resizing; smaller ones are enlarged",
        "max_pixels": "most pixels of an image after resizing",
        "max_tiles": "most tiles of an image, without the thumbnail",
        "total_tiles": "most tiles of all images of a prompt, without thumbnails",
        "max_slices": "most slices of an image, without the whole one",
    }
)
"""What bounds the size of an image, and so its number of visual tokens, where the family has such a setting."""

SearchMethod = Literal["greedy", "one_shot"]
OneShotBy = Literal["outcome", "kl"]
Measure = Literal["teacher_forced", "generation", "kl", "agreement", "exact_agreement", "first_token_kl"]
"""What plans are scored by: whether answers are right, or how close they are to the dense model's."""
OWN_ANSWERS: tuple[Measure, ...] = ("kl", "agreement", "exact_agreement", "first_token_kl")
"""Objectives that compare with the dense model's own answers, and need no others."""
DIVERGENCES: tuple[Measure, ...] = ("kl", "first_token_kl")
"""Measures whose outcomes are divergences with their sign turned."""


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class DataConfig:
    """The samples that plans are scored on."""

    source: str | None = None
    """The path of your own FILE.jsonl, the path of a benchmark mixture FILE.json, made with
    python -m rlens_jax.data.benchmarks.mixture, a folder of images, which has no answers, or `pages` (the embedded model's
    datasets). Only a dry run can do without."""
    benchmarks: str | None = None
    """Folder with VLMEvalKit's TSV files. A mixture needs it."""
    validation_samples: int = 120
    """Validation samples per dataset, used by the search: with `pages`, 4 questions about each image. A mixture ignores it."""
    test_samples: int = 150
    """Held-out samples per dataset, used by the curves. A mixture ignores it."""
    confirmation_samples: int = 0
    """With `pages`, held-out samples per dataset that confirm a joint plan and nothing else; 0 takes those of the curves, as
    other sources always do."""
    cache: str | None = None
    """Folder for prepared datasets; null means the user's cache folder."""
    held_out_share: float = 0.5
    """Share of the images of each dataset in your own JSONL file or folder that is held out for the curves, between 0 and 1."""

    @property
    def is_mixture(self) -> bool:
        """Whether the source is a mixture of benchmarks, whose images are read as VLMEvalKit reads them."""
        return self.source is not None and self.source.endswith(".json")

    @property
    def has_answers(self) -> bool:
        """Whether the samples have right answers; those of a folder of images have none."""
        return self.source is None or self.source == PAGES or self.source.endswith((".json", ".jsonl"))

    def __post_init__(self) -> None:
        _check_types("data", self)
        _at_least(1, "data", self, "validation_samples", "test_samples")
        _at_least(0, "data", self, "confirmation_samples")
        if not 0 < self.held_out_share < 1:
            raise UserError(f"data.held_out_share must be above 0 and below 1, not {shown(self.held_out_share)}")


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class SearchConfig:
    """The Layer Ranking Algorithm."""

    operators: tuple[Operator, ...] = OPERATORS
    """Operators to rank, each separately: attention (Hollow Attention), ffn (Dynamic FFN)."""
    position_layers: int | None = None
    """L_p: the number of last layers that are ranked by position instead of searched; null means a quarter of the layers,
    0 searches all."""
    penalty: float = 2.0
    """Weight of a drop of a dataset's metric, relative to a gain (paper: 2)."""
    change: Literal["relative", "absolute"] = "relative"
    """Whether the change of a dataset's metric is divided by the dense model's metric."""
    method: SearchMethod = "greedy"
    """`greedy` appends the best layer round by round, on top of those ranked before; `one_shot` sorts the layers by their scores
    in the first round, which is much faster and gives another ranking."""
    one_shot_by: OneShotBy = "outcome"
    """What `one_shot` sorts the layers by: `outcome`, the score of the objective; `kl`, how little the distributions of the
    answer's tokens move away from the dense model's, which tells layers apart that get the same answers right."""
    stopping: Literal["exact", "none"] = "exact"
    """`exact` stops the evaluation of a candidate that cannot become the best of its round any more, which changes no ranking;
    `none` evaluates all candidates on all samples, as `one_shot` always does."""
    objective: Measure = "teacher_forced"
    """`teacher_forced` checks in one pass whether greedy decoding would produce a reference answer exactly; `generation`
    generates the answer and compares the text. The others need no answers: they compare with the dense model on the answer
    that it generates itself, by the divergence of the distributions of its tokens (`kl`), the share of its tokens that stay the
    best ones (`agreement`), or whether all do (`exact_agreement`); `first_token_kl` reproduces ShortV's divergence."""
    max_new_tokens: int = 32
    """Max tokens per generated answer, with every objective but `teacher_forced`."""
    base_attention: tuple[int, ...] = ()
    """Layers with Hollow Attention in every plan; only if attention is not ranked."""
    base_ffn: tuple[int, ...] = ()
    """Layers with the Dynamic FFN in every plan; only if ffn is not ranked."""

    def __post_init__(self) -> None:
        _check_types("search", self)
        if not self.operators:
            raise UserError(f"search.operators must name at least one of {', '.join(OPERATORS)}")
        if len(set(self.operators)) < len(self.operators):
            raise UserError(f"search.operators names an operator twice: {', '.join(self.operators)}")
        _at_least(0, "search", self, "penalty", "position_layers")
        _at_least(1, "search", self, "max_new_tokens")
        if self.one_shot_by == "kl" and self.method != "one_shot":
            raise UserError("search.one_shot_by kl needs search.method one_shot; a greedy search scores by search.objective")
        if self.one_shot_by == "kl" and self.objective == "generation":
            raise UserError("search.one_shot_by kl compares tokens of known answers; it needs search.objective teacher_forced")
        for operator in OPERATORS:
            name = f"search.base_{operator}"
            layers = getattr(self, f"base_{operator}")
            if any(layer < 0 for layer in layers) or len(set(layers)) < len(layers):
                raise UserError(f"{name} must be different layer numbers, each at least 0, not {shown(layers)}")
            if layers and operator in self.operators:
                raise UserError(f"{name} reduces {operator} in every plan; then search.operators must not rank {operator} too")

    def by(self, method: SearchMethod, one_shot_by: OneShotBy = "outcome") -> "SearchConfig":
        """The same search by another method; one that sorts all layers by one round needs all of their scores."""
        stopping = self.stopping if method == "greedy" else "none"
        return dataclasses.replace(self, method=method, one_shot_by=one_shot_by, stopping=stopping)

    @property
    def measure(self) -> Measure:
        """What plans are scored by."""
        return "kl" if self.one_shot_by == "kl" else self.objective

    @property
    def own_answers(self) -> bool:
        """Whether plans are compared with the dense model on the answers that it generates."""
        return self.objective in OWN_ANSWERS

    @property
    def best_outcome(self) -> float:
        """The largest outcome that a sample can have."""
        return 0.0 if self.measure in DIVERGENCES else 1.0

    @property
    def relative(self) -> bool:
        """Whether the changes of a score are relative to the dense model's metrics, which are 0 where they are divergences."""
        return self.change == "relative" and self.measure not in DIVERGENCES

    @property
    def alpha(self) -> float:
        """The weight of a drop in a score; 1 against the dense model itself, where nothing can rise."""
        return 1.0 if self.measure in OWN_ANSWERS else self.penalty

    def base(self) -> Plan:
        """The reductions that every plan of the search has."""
        return Plan(self.base_attention, self.base_ffn)


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class JointConfig:
    """The joint search: the best plan over layers, operators and levels under a budget."""

    budget: str | None = None
    """loss=1% (the largest loss), flops=60% or time=0.7 (what is left of the dense prefill); null searches no such plan."""
    cost: Literal["time", "flops"] = "time"
    """What a plan saves as much as possible of under a budget of loss: the measured time of the prefill, or its FLOPs. Budgets
    of flops and time decide it themselves."""
    attention_levels: tuple[str, ...] = ("standard", "skip")
    """Levels of attention for visual tokens below the dense one: a range, `standard` (that of the reduction), `text`, `skip`."""
    ffn_levels: tuple[str, ...] = ("standard", "skip")
    """Levels of the FFN for visual tokens below the dense one: a fraction of the units, `standard` (that of the reduction),
    `skip`."""
    method: Literal["greedy", "lazy", "additive"] = "greedy"
    """`greedy` scores all moves in each round; `lazy` only those that were best before, which is approximate; `additive` scores
    each move once, on the dense model, which is a rougher approximation."""
    jump: bool = False
    """Whether a move may pass levels."""
    position_layers: int = 0
    """The number of last layers that are first reduced by position, both operators at once, before all else is searched."""
    milestones: float = 0.05
    """Cost between two plans of the path that are tested on the held-out samples, as a share of the dense cost."""

    def __post_init__(self) -> None:
        _check_types("joint", self)
        _at_least(0, "joint", self, "position_layers")
        if not 0 < self.milestones < 1:
            raise UserError(f"joint.milestones must be above 0 and below 1, not {shown(self.milestones)}")
        for name in ("attention_levels", "ffn_levels"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"joint.{name} names a level twice: {', '.join(getattr(self, name))}")
        if self.budget is not None:
            parse_budget(self.budget)
        _ = self.levels

    @property
    def levels(self) -> Levels:
        """The levels as they are written, dense first and skip last; the standard ones keep their name."""
        attention = (parse_level("attention", text) for text in self.attention_levels)
        ffn = (parse_level("ffn", text) for text in self.ffn_levels)
        return Levels(*((FULL, *sorted(levels, key=lambda level: level == SKIP)) for levels in (attention, ffn)))


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class ComputeConfig:
    """Precision, batches, static shapes and memory."""

    dtype: Dtype | None = None
    """Type of weights and activations; null means bfloat16 on an accelerator and float32 on a CPU."""
    matmul_precision: Literal["highest", "high", "default"] = "highest"
    """JAX's matmul precision. On TPU, `default` multiplies float32 in bfloat16; on CPU all are the same."""
    batch_size: int = 0
    """Samples per batch of a work group; 0 means as many samples of the largest bucket as fit into a device's memory, but fewer
    where batches would have many rows without a sample."""
    model_shards: int = 1
    """Devices per copy of the model (size of the mesh's `model` axis); the copies share the batches."""
    text_slots: tuple[int, ...] | None = None
    """Bucket sizes for text tokens, ascending: a sample is padded to the smallest that holds its tokens; null chooses them from
    the data."""
    visual_slots: tuple[int, ...] | None = None
    """Bucket sizes for a sample's visual tokens, ascending; null chooses them from the data."""
    patch_slots: tuple[int, ...] | None = None
    """Bucket sizes for the vision tower's patches of one image, ascending: of all its tiles together; in MiniCPM-V, of one
    slice; null chooses them from the data."""
    max_buckets: int = 8
    """Most pairs of text and visual slots, and most image sizes, that are chosen from the data: each is compiled."""
    sharing: bool = True
    """Whether prompts about the same images share a row, in which what they begin with is computed once."""
    state_memory_gb: float = 2.0
    """Memory in GB for the states that a round's candidates continue from."""
    cpu_devices: int = 0
    """Devices that a CPU is divided into, each with a copy of the model; 0 means one per core, as far as a quarter of the memory
    holds the copies."""
    ffn_path: FfnPath = "auto"
    """How layers with the Dynamic FFN compute visual tokens: `gathered`, by copies of the kept units; `masked`, by all units, of
    which the others count 0; `kernel`, which fetches the kept units on a TPU; `auto` takes the fastest by arithmetic for the
    device, the tokens and the batch. All compute the same, in sums of another order."""
    compilation_cache: str | None = None
    """Folder of the persistent compilation cache, also on a store (gs://bucket/folder); null means the user's cache folder."""

    def __post_init__(self) -> None:
        _check_types("compute", self)
        _at_least(1, "compute", self, "model_shards", "max_buckets")
        _at_least(0, "compute", self, "batch_size", "state_memory_gb", "cpu_devices")
        for name in ("text_slots", "visual_slots", "patch_slots"):
            slots = getattr(self, name)
            if slots is not None and (not slots or slots[0] < 1 or list(slots) != sorted(set(slots))):
                raise UserError(f"compute.{name} must be at least one size, each at least 1, ascending, not {shown(slots)}")


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class ReportConfig:
    """The report's comparisons, intervals and timings."""

    extent: Literal["full", "none"] = "full"
    """`none` ends the run with the rankings: no held-out curves, no savings, no report."""
    random_rankings: int = 0
    """Number of random rankings to compare with on the held-out samples; each costs several evaluations."""
    bootstrap_samples: int = 1000
    """Draws of the bootstrap behind the 95 % intervals."""
    full_search: bool = False
    """Also search without the position prior (L_p = 0), for comparison; costs about one more search."""
    timing_repeats: int = 5
    """Measurements per prefill time; medians are reported."""
    samples: int = 0
    """Held-out samples, at most 6, whose redundancy the report shows: kept FFN units, attention to images, and maps over them."""

    def __post_init__(self) -> None:
        _check_types("report", self)
        _at_least(0, "report", self, "random_rankings", "samples")
        if self.samples > MAX_SEEN:
            raise UserError(f"report.samples must be at most {MAX_SEEN}, not {self.samples}; the report holds their images")
        _at_least(1, "report", self, "bootstrap_samples", "timing_repeats")


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class HostsConfig:
    """The processes of a run on several hosts. TPU VMs, GKE and SLURM need no settings: the cluster is detected."""

    coordinator: str | None = None
    """HOST:PORT of process 0, reachable from all hosts."""
    num_processes: int | None = None
    """Number of processes of the run, usually one per host; 1 runs alone, also on a cluster."""
    process_id: int | None = None
    """Index of this process, from 0; process 0 writes the results."""
    wait_seconds: int = 300
    """Seconds that the processes wait for each other at the start."""
    heartbeat_seconds: int = 30
    """Seconds without a heartbeat after which a process counts as lost and the others end."""

    def __post_init__(self) -> None:
        _check_types("hosts", self)
        _at_least(0, "hosts", self, "process_id")
        _at_least(1, "hosts", self, "num_processes", "wait_seconds", "heartbeat_seconds")
        if self.num_processes == 1:
            return
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            members = ("coordinator", "num_processes", "process_id")
            missing = [f"hosts.{name}" for name in members if getattr(self, name) is None]
            if len(missing) < len(members):
                raise UserError(f"{' and '.join(missing)} must be set too: a process needs all three, or none")
            return
        _, colon, port = self.coordinator.rpartition(":")
        if not (colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(f"hosts.coordinator must be HOST:PORT, not {shown(self.coordinator)}")
        if self.process_id >= self.num_processes:
            raise UserError(
                f"hosts.process_id must be below hosts.num_processes, which is {self.num_processes}, not {self.process_id}"
            )


GROUPS: Mapping[str, type[Any]] = {
    "data": DataConfig,
    "search": SearchConfig,
    "joint": JointConfig,
    "reduction": Reduction,
    "compute": ComputeConfig,
    "report": ReportConfig,
    "hosts": HostsConfig,
}
"""The fields of `RunConfig` that have fields themselves."""


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class RunConfig:
    """A ranking run."""

    model: str = "embedded"
    """`embedded`, the model that comes with the package; the folder of a checkpoint, also on a store (gs://bucket/folder);
    or a name on the Hugging Face hub."""
    output: str = "runs/rank"
    """Folder for the results and the journal, also on a store (gs://bucket/run); a stopped run resumes from it."""
    seed: int = 0
    """Seed of all random draws: samples, random rankings, bootstrap, random probes."""
    data: DataConfig = field(default_factory=DataConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    reduction: Reduction = field(default_factory=Reduction)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    def __post_init__(self) -> None:
        _check_types("", self)
        _at_least(0, "", self, "seed")
        for name in ("model", "output"):
            if not getattr(self, name):
                raise UserError(f"{name} must not be empty")
        for text in (self.output, self.compute.compilation_cache or ""):
            place(text)
        check_local("data.cache", self.data.cache or "")

    @property
    def folder(self) -> Path:
        """The output folder on this machine: the mirror of an address (`rlens_jax.mirrors`)."""
        return place(self.output)

    @property
    def held_out_measure(self) -> Measure:
        """What held-out curves show: right answers where the samples have some, else agreement with the dense model."""
        if not self.search.own_answers:
            return self.search.objective
        return "teacher_forced" if self.data.has_answers else "agreement"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The configuration with these nested values, and defaults for all others."""
        groups = {name: _group(name, values[name]) for name in GROUPS if name in values}
        return cls(**{**values, **groups})

    def to_dict(self) -> dict[str, Any]:
        """All values, as the nested dicts and lists of JSON and YAML."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists

    def portable(self) -> dict[str, Any]:
        """`to_dict` without folders and hosts, which differ between runs and machines and decide no result."""
        values = self.to_dict()
        del values["output"], values["compute"]["compilation_cache"], values["hosts"]
        del values["data"]["cache"], values["data"]["benchmarks"]
        return values

    def deciding_settings(self) -> dict[str, Any]:
        """The values that must agree for a journal to be resumed: a run's folder holds one search.

        This leaves out what changes neither outcome nor ranking: folders, early stopping, the memory for base states, the joint
        search, the report's options, the mesh and the path of the FFN (with another, outcomes differ in rounding at most). The
        model and the samples are compared by hash, and the buckets as they are used (`rlens_jax.engine.session`).
        """
        values = self.portable()
        del values["model"], values["report"], values["joint"], values["search"]["stopping"]
        del values["data"]["source"], values["data"]["confirmation_samples"]
        for name in (
            "state_memory_gb",
            "model_shards",
            "cpu_devices",
            "ffn_path",
            "text_slots",
            "visual_slots",
            "patch_slots",
            "max_buckets",
        ):
            del values["compute"][name]
        return values


def dotted_name(group: str, name: str) -> str:
    """The name of a field in options and error messages. A field of the run itself is in the group ""."""
    return f"{group}.{name}" if group else name


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Type of each field by name."""
    # typing.get_type_hints returns nothing for classes under no_type_check.
    return {item.name: item.type for item in dataclasses.fields(cls)}


def alternatives(hint: Any) -> list[Any]:
    """The members of a union type, or the type itself."""
    return list(get_args(hint)) if get_origin(hint) in (types.UnionType, Union) else [hint]


def fits(hint: Any, value: Any) -> bool:
    """Whether a value has the type of a field."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return type(value) is tuple and all(fits(get_args(hint)[0], item) for item in value)
    if len(alternatives(hint)) > 1:
        return any(fits(part, value) for part in alternatives(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def wrong_type(name: str, hint: Any, text: str) -> UserError:
    """The error for a value of the wrong type, shown as `text`, with the nearest choice if there are choices."""
    near = ""
    for choices in (get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal):
        near = near or suggest(text.strip("'"), choices)
    return UserError(f"{name} must be {_described(hint)}, not {text}{near}")


def shown(value: Any) -> str:
    """A value as error messages show it."""
    return quoted(list(value) if isinstance(value, tuple) else value)


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return "a list of whole numbers" if inner is int else f"a list with each {_described(inner)}"
    if len(alternatives(hint)) > 1 and str not in alternatives(hint):
        return " or ".join(map(_described, alternatives(hint)))
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}
    kinds = alternatives(hint)
    if float in kinds:  # a fraction can also be the text of an exact decimal
        kinds = [kind for kind in kinds if kind is not str]
    return " or ".join(names[kind] for kind in kinds)


def _check_types(group: str, config: Any) -> None:
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, list) and tuple in [get_origin(kind) for kind in alternatives(hint)]:
            value = tuple(value)
            object.__setattr__(config, name, value)
        if not fits(hint, value):
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                raise UserError(f"{name} must be a {hint.__name__}, not {shown(value)}")
            raise wrong_type(dotted_name(group, name), hint, shown(value))


def _at_least(bound: int, group: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < bound:
            raise UserError(f"{dotted_name(group, name)} must be at least {bound}, not {value}")


def _group(name: str, values: Mapping[str, Any]) -> Any:
    try:
        return GROUPS[name](**values)
    except UserError as error:
        # A Reduction is also made elsewhere and does not know that it is a group here.
        raise UserError(str(error) if str(error).startswith(f"{name}.") else f"{name}.{error}") from error
