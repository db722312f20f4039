"""What a run is: frozen dataclasses, read from a YAML file, every field overridable on the command line.

Values are checked when a dataclass is made, wherever they come from, and the message names the field. Paths
are not looked at here: whoever opens them says what is wrong with them.
"""

import dataclasses
import json
import math
import re
import sys
import types
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, no_type_check

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from rlens_jax.errors import UserError, suggest
from rlens_jax.plan import OPERATORS, Operator, Plan, Reduction
from rlens_jax.resources import preset_path

DEFAULT_PRESET = "embedded"
_HELP = ("-h", "--help")


# As in plan.py: fields are user input and checked here, before any run-time type checker sees them.
@no_type_check
@dataclass(frozen=True)
class DataConfig:
    """The samples that plans are scored on."""

    source: str = "pages"
    """`pages`, the datasets of the embedded model; the path of your own FILE.jsonl; or that of a mixture of benchmarks,
    FILE.json, made with python -m rlens_jax.data.benchmarks.mixture (--data for short)."""
    benchmarks: str | None = None
    """Folder of VLMEvalKit's TSV files, which a mixture needs."""
    validation_samples: int = 120
    """How many validation samples of each dataset the search uses; a mixture is used as it is."""
    test_samples: int = 150
    """How many held-out samples of each dataset the curves use; a mixture is used as it is."""
    cache: str | None = None
    """Folder in which prepared datasets are kept; null is the user's cache folder."""
    held_out_share: float = 0.5
    """Of your own JSONL file: the share of its rows held out for the curves, between 0 and 1."""

    def __post_init__(self) -> None:
        _check_types("data", self)
        _at_least(1, "data", self, "validation_samples", "test_samples")
        if not 0 < self.held_out_share < 1:
            raise UserError(f"data.held_out_share must be above 0 and below 1, not {_shown(self.held_out_share)}")


@no_type_check
@dataclass(frozen=True)
class SearchConfig:
    """The Layer Ranking Algorithm."""

    operators: tuple[Operator, ...] = OPERATORS
    """Which operators are ranked, each by itself: attention (Hollow Attention), ffn (Dynamic FFN)."""
    position_layers: int | None = None
    """L_p: so many of the last layers are ranked by position instead of searched; null is a quarter of the
    layers, 0 searches all."""
    penalty: float = 2.0
    """How much more a drop of a dataset's metric weighs than a gain (paper: 2)."""
    change: Literal["relative", "absolute"] = "relative"
    """Whether a dataset's change counts as a share of the dense model's metric, or as it is."""
    objective: Literal["teacher_forced", "generation"] = "teacher_forced"
    """`teacher_forced` asks in one pass whether greedy decoding would produce a reference answer exactly;
    `generation` generates the answer and compares the text."""
    max_new_tokens: int = 32
    """The longest answer that `generation` generates, in tokens."""
    base_attention: tuple[int, ...] = ()
    """Layers with Hollow Attention in every plan; only when attention itself is not ranked."""
    base_ffn: tuple[int, ...] = ()
    """Layers with the Dynamic FFN in every plan; only when ffn itself is not ranked."""

    def __post_init__(self) -> None:
        _check_types("search", self)
        if not self.operators:
            raise UserError(f"search.operators must name at least one of {', '.join(OPERATORS)}")
        if len(set(self.operators)) < len(self.operators):
            raise UserError(f"search.operators names an operator twice: {', '.join(self.operators)}")
        _at_least(0, "search", self, "penalty", "position_layers")
        _at_least(1, "search", self, "max_new_tokens")
        for operator in OPERATORS:
            name = f"search.base_{operator}"
            layers = getattr(self, f"base_{operator}")
            if any(layer < 0 for layer in layers) or len(set(layers)) < len(layers):
                raise UserError(f"{name} must be different layer numbers from 0 on, not {_shown(layers)}")
            if layers and operator in self.operators:
                raise UserError(
                    f"{name} reduces {operator} in every plan, so {operator} cannot be ranked too; "
                    f"leave {operator} out of search.operators"
                )

    def base(self) -> Plan:
        """What every plan of the search reduces."""
        return Plan(self.base_attention, self.base_ffn)


@no_type_check
@dataclass(frozen=True)
class ComputeConfig:
    """How plans are computed: precision, batches, static shapes, memory."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of weights and activations."""
    matmul_precision: Literal["highest", "high", "default"] = "highest"
    """JAX's matmul precision. On TPU, `default` multiplies float32 in bfloat16; on CPU all are the same."""
    batch_size: int = 0
    """Samples in one batch of a work group; 0 is as many of the largest bucket as fit into a device's memory."""
    model_shards: int = 1
    """Over how many devices each copy of the model is cut (the mesh's `model` axis); the copies share the batches."""
    text_slots: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Bucket sizes, ascending: a sample's text tokens are padded to the smallest that holds them."""
    visual_slots: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Bucket sizes, ascending, for a sample's visual tokens."""
    patch_slots: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    """Bucket sizes, ascending, for the vision tower's patches of one image: of all its tiles together, and in MiniCPM-V of
    one slice."""
    state_memory_gb: float = 2.0
    """Memory, in GB, for the states from which the candidates of a round continue."""
    compilation_cache: str | None = None
    """Folder of the persistent compilation cache; null is the user's cache folder."""

    def __post_init__(self) -> None:
        _check_types("compute", self)
        _at_least(1, "compute", self, "model_shards")
        _at_least(0, "compute", self, "batch_size", "state_memory_gb")
        for name in ("text_slots", "visual_slots", "patch_slots"):
            slots = getattr(self, name)
            if not slots or slots[0] < 1 or list(slots) != sorted(set(slots)):
                raise UserError(
                    f"compute.{name} must be at least one size, from 1 on and ascending, not {_shown(slots)}"
                )


@no_type_check
@dataclass(frozen=True)
class ReportConfig:
    """What the report compares with, and how sure it is."""

    random_rankings: int = 10
    """How many random rankings are drawn to compare with."""
    bootstrap_samples: int = 1000
    """Draws of the bootstrap behind the 95 % intervals."""
    full_search: bool = False
    """Also search without the position prior (L_p = 0), to compare; costs about a search more."""
    timing_repeats: int = 5
    """How often a prefill is timed; medians are reported."""

    def __post_init__(self) -> None:
        _check_types("report", self)
        _at_least(1, "report", self, "random_rankings", "bootstrap_samples", "timing_repeats")


@no_type_check
@dataclass(frozen=True)
class HostsConfig:
    """The processes of a run on several hosts; on TPU VMs, GKE and SLURM they are found without being told."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 is reached by all."""
    num_processes: int | None = None
    """How many processes the run has, as a rule one a host; 1 is a run by itself, on a cluster too."""
    process_id: int | None = None
    """Which of them this one is, from 0 on; process 0 writes the results."""
    wait_seconds: int = 300
    """How long the processes wait for each other at the start."""
    heartbeat_seconds: int = 30
    """A process that gives no sign of life for so long is lost, and the others end."""

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
                raise UserError(f"{' and '.join(missing)} must be set too: a process is told all three, or none")
            return
        _, colon, port = self.coordinator.rpartition(":")
        if not (colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(f"hosts.coordinator must be HOST:PORT, not {_shown(self.coordinator)}")
        if self.process_id >= self.num_processes:
            raise UserError(
                f"hosts.process_id must be below hosts.num_processes, which is {self.num_processes}, "
                f"not {self.process_id}"
            )


@no_type_check
@dataclass(frozen=True)
class RunConfig:
    """A ranking run."""

    model: str = "embedded"
    """`embedded`, the model that comes with the package, or the folder of a checkpoint."""
    output: str = "runs/rank"
    """Folder for the results and the journal; a run that was stopped resumes from it."""
    seed: int = 0
    """Seed of everything that is drawn: samples, random rankings, bootstrap, random probes."""
    data: DataConfig = field(default_factory=DataConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
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


_GROUPS: dict[str, type] = {
    "data": DataConfig,
    "search": SearchConfig,
    "reduction": Reduction,
    "compute": ComputeConfig,
    "report": ReportConfig,
    "hosts": HostsConfig,
}
_SHORTCUTS = {"--data": "--data.source"}


def load_config(argv: Sequence[str], others: Mapping[str, str] | None = None) -> RunConfig:
    """The configuration of a command line: preset or YAML file, overridden by the options, in their order.

    `others` are options that the command has taken out of its arguments already, with what they do: `--help` tells of them.

    `--help` prints the explanation of every field, with the default that the preset gives it, and exits.

    Raises:
      UserError: for an unknown option or field (with the nearest name), a value of a wrong type or out of
        range (naming the field), or a file that cannot be read.
    """
    parts = [part for argument in argv for part in _split_option(argument)]
    arguments = [part for part in parts if part not in _HELP]
    others = others or {}
    _check_options(arguments, others)
    help_wanted = len(arguments) < len(parts)
    parser = _parser(help_wanted, others)
    try:
        values = parser.parse_args(list(_with_paths(arguments)))
    except ArgumentError as error:
        raise UserError(_one_line(str(error))) from error
    if help_wanted:
        # Wherever it stands, --help is answered with the defaults that hold without it.
        parser.set_defaults({name: values[name] for name in _hints() if name not in ("model", "output")})
        parser.print_help()
        sys.exit(0)
    groups = {name: _group(name, vars(values[name])) for name in _GROUPS}
    return RunConfig(model=values.model, output=values.output, seed=values.seed, **groups)


def _group(name: str, values: dict[str, Any]) -> Any:
    try:
        return _GROUPS[name](**values)
    except UserError as error:
        # A Reduction is made elsewhere too, and does not know its place in a run's configuration.
        raise UserError(str(error) if str(error).startswith(f"{name}.") else f"{name}.{error}") from error


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as nested dicts and lists, as JSON and YAML know them."""
    return _plain(dataclasses.asdict(config))


def portable(config: RunConfig) -> dict[str, Any]:
    """`to_dict` without what differs from one run or machine to another and decides no result: folders, hosts."""
    values = to_dict(config)
    del values["output"], values["compute"]["compilation_cache"], values["hosts"]
    del values["data"]["cache"], values["data"]["benchmarks"]
    return values


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Dotted name -> JSON text of every leaf of nested dicts, as two configurations are compared."""
    if isinstance(value, dict) and value:
        leaves: dict[str, str] = {}
        for key, child in value.items():
            leaves |= flat(child, f"{name}.{key}" if name else key)
        return leaves
    return {name: json.dumps(value)}


def fingerprint(config: RunConfig, *, model_hash: str, data_hash: str, **facts: str) -> dict[str, Any]:
    """What must agree for a journal to be resumed: a run's folder holds one search.

    Hashes stand for the model and the samples, wherever they lie. Left out is what can change no outcome and
    no ranking: folders, the memory for base states (results do not depend on it), and the report's options.
    `facts` are further ones of the machine that decide outcomes, such as the kind of device.
    """
    values = portable(config)
    del values["model"], values["report"], values["data"]["source"], values["compute"]["state_memory_gb"]
    # A run goes on with other hosts and another mesh: outcomes differ in rounding at most.
    del values["compute"]["model_shards"]
    return {"model_hash": model_hash, "data_hash": data_hash, **facts, **values}


def _parser(explained: bool, others: Mapping[str, str]) -> ArgumentParser:
    # Reading the explanations out of the source takes longer than all else here, so only --help does it.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python -m rlens_jax.rank",
        usage="%(prog)s [--model FOLDER] [--data FILE.jsonl] [--output DIR] [--config FILE] [--GROUP.FIELD VALUE ...]",
        description="Rank the decoder layers of a multimodal LLM by how little they need full visual "
        "computation. Without options: the embedded model on its own data.",
        epilog=" ".join(
            ["Lists are written as 16,32 (in YAML as [16, 32]); null is no value."]
            + [f"{name}: {text}" for name, text in others.items()]
        ),
        exit_on_error=False,
        print_config=None,
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help=f"YAML file with any of the fields below, or the name of a preset; {DEFAULT_PRESET} by default",
    )
    for prefix, cls in (("", RunConfig), *_GROUPS.items()):
        group = parser.add_argument_group(prefix or "run", description=_first_line(cls) if prefix else None)
        docs = _field_docs(cls) if explained else {}
        for item in dataclasses.fields(cls):
            if item.name in _GROUPS and not prefix:
                continue
            name = f"{prefix}.{item.name}" if prefix else item.name
            group.add_argument(
                f"--{name}",
                type=item.type,
                default=item.default,
                help=docs.get(item.name),
                metavar=_metavar(item.type),
            )
    return parser


def _types(cls: Any) -> dict[str, Any]:
    # Not typing.get_type_hints, which knows nothing of classes that run-time type checkers leave alone.
    return {item.name: item.type for item in dataclasses.fields(cls)}


def _hints() -> dict[str, Any]:
    """Dotted name -> type of every field."""
    hints = {name: hint for name, hint in _types(RunConfig).items() if name not in _GROUPS}
    for group, cls in _GROUPS.items():
        hints |= {f"{group}.{name}": hint for name, hint in _types(cls).items()}
    return hints


def _field_docs(cls: type) -> dict[str, str]:
    params = docstring_parser.parse_from_object(cls).params
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").split("\n")[0]


def _metavar(hint: Any) -> str | None:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "LIST"
    kinds = [kind for kind in _alternatives(hint) if kind is not types.NoneType]
    return {int: "N", str: "TEXT"}.get(kinds[0], "X")


def _with_paths(arguments: Sequence[str]) -> Iterator[str]:
    """Shortcuts in full, lists in brackets, presets as paths, the default preset first when none is named."""
    if "--config" not in arguments[::2]:
        yield from ("--config", _config_path(DEFAULT_PRESET))
    hints = _hints()
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        yield _SHORTCUTS.get(option, option)
        if get_origin(hints.get(option[2:])) is tuple and not value.startswith("["):
            value = f"[{value}]"
        yield _config_path(value) if option == "--config" else value


def _split_option(argument: str) -> Iterable[str]:
    return argument.split("=", 1) if argument.startswith("--") and "=" in argument else (argument,)


def _config_path(name: str) -> str:
    """The path of a preset, or of a YAML file after a look at its fields."""
    is_file = "/" in name or name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else Path(str(preset_path(name)))
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold fields with values, such as `seed: 1`")
    fields = {item.name for item in dataclasses.fields(RunConfig)}
    _check_names(path, "", values, fields)
    for group, cls in _GROUPS.items():
        if group in values:
            if not isinstance(values[group], dict):
                raise UserError(f"{path}: {group} must hold fields, not {_shown(values[group])}")
            _check_names(path, group, values[group], {item.name for item in dataclasses.fields(cls)})
    return str(path)


def _check_names(path: Path, group: str, values: Mapping[Any, Any], known: Iterable[str]) -> None:
    for name in values:
        if name not in known:
            dotted = f"{group}.{name}" if group else str(name)
            raise UserError(f"{path}: unknown field {dotted}{suggest(str(name), known)}")


def _check_options(arguments: Sequence[str], others: Iterable[str]) -> None:
    """UserError unless the arguments are known options, each followed by a value."""
    known = ["--help", "--config", *_SHORTCUTS, *(f"--{name}" for name in _hints()), *others]
    for option in arguments[::2]:
        if not option.startswith("-"):
            raise UserError(f"unexpected argument {option!r}; options start with --, and --help lists all")
        if option not in known:
            near = suggest(option, known) or suggest(f"--{_qualified(option)}", known)
            raise UserError(f"unknown option {option}{near}; --help lists all")
    if len(arguments) % 2:
        raise UserError(f"option {arguments[-1]} needs a value")


def _qualified(option: str) -> str:
    """The dotted name of the field that an option without its group means, or the option's own name."""
    name = option.lstrip("-").replace("-", "_")
    return next((dotted for dotted in _hints() if dotted.rpartition(".")[2] == name), name)


def _one_line(message: str) -> str:
    """The parser's complaint about a value, in the words of this module."""
    key = re.search(r'key "([\w.]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    hint = _hints().get(key[1]) if key else None
    if not (key and value and hint):
        return " ".join(message.split())
    return _wrong_type(key[1], hint, value[1])


def _wrong_type(name: str, hint: Any, shown: str) -> str:
    near = ""
    for choices in (get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal):
        near = near or suggest(shown.strip("'"), choices)
    return f"{name} must be {_described(hint)}, not {shown}{near}"


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return "a list of whole numbers" if inner is int else f"a list with each {_described(inner)}"
    names = {int: "a whole number", float: "a number", str: "a text", types.NoneType: "null"}
    kinds = _alternatives(hint)
    if float in kinds:  # a fraction may be written as an exact decimal text
        kinds = [kind for kind in kinds if kind is not str]
    return " or ".join(names[kind] for kind in kinds)


def _alternatives(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (types.UnionType, Union) else [hint]


def _fits(hint: Any, value: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return type(value) is tuple and all(_fits(get_args(hint)[0], item) for item in value)
    if get_origin(hint) in (types.UnionType, Union):
        return any(_fits(part, value) for part in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _check_types(group: str, config: Any) -> None:
    for name, hint in _types(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, list) and get_origin(hint) is tuple:
            value = tuple(value)
            object.__setattr__(config, name, value)
        if not _fits(hint, value):
            dotted = f"{group}.{name}" if group else name
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                raise UserError(f"{dotted} must be a {hint.__name__}, not {_shown(value)}")
            raise UserError(_wrong_type(dotted, hint, _shown(value)))


def _at_least(bound: int, group: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < bound:
            dotted = f"{group}.{name}" if group else name
            raise UserError(f"{dotted} must be at least {bound}, not {value}")


def _shown(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
