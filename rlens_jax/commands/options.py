"""Options that several commands share: of models and plans, and, for runs, an option for every field of the configuration.

The fields also come from the YAML files and presets that `--config` names. An option means the same in every command.
"""

import argparse
import ast
import inspect
import json
import os
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, get_args, get_origin

from rlens_jax.config import (
    DTYPES,
    GROUPS,
    LIMITS,
    PAGES,
    Dtype,
    RunConfig,
    alternatives,
    dotted_name,
    field_types,
    fits,
    shown,
    wrong_type,
)
from rlens_jax.console import ArgumentParser, say
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import check_local
from rlens_jax.flops import PUBLISHED_DECODERS, DecoderSizes
from rlens_jax.metrics.score import CURRENT, RULES
from rlens_jax.mirrors import address_of, check_writable, fetched, fetched_folder, fetched_run, place
from rlens_jax.plan_file import PlanFile, parse_first, parse_pruning, read_plan
from rlens_jax.resources import preset_path
from rlens_jax.yaml_file import read_yaml

CONFIG = "config"
EMBEDDED = RunConfig.model
SHORT_NAME = ", or the short name of a published model"
SHORT = {
    "data.source": "--data",
    "compute.dtype": "--dtype",
    "compute.batch_size": "--batch-size",
    "report.extent": "--report",
    "joint.budget": "--budget",
}
"""Fields of a run with a second, shorter spelling, which most other commands have, too."""

Setting = tuple[str, str]
"""Dotted name and text of a field, or `config` and the name of a file or preset."""


def add_model_argument(parser: ArgumentParser, metavar: str = "MODEL", kinds: str = "") -> None:
    """The model, as argument or as --model, and --revision; `read_model` reads them. `kinds` are further kinds of models."""
    text = f'a folder (published or converted), "embedded", a name on the Hugging Face hub{kinds}'
    add_argument_and_option(parser, metavar, "--model", text)
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")


def read_model(parser: ArgumentParser, options: argparse.Namespace, metavar: str = "MODEL") -> str | None:
    """The model, with its revision; None if there is none. UserError if two are given, or as `at_revision`."""
    model = read_argument_or_option(parser, options, metavar, "--model")
    if options.revision is None:
        return model
    if model is None:
        parser.error(f"--revision needs a {metavar}")
    # Imported here: the reader of checkpoints imports JAX.
    from rlens_jax.checkpoints.model_folder import at_revision

    return at_revision(model, options.revision)


def required_model(parser: ArgumentParser, options: argparse.Namespace) -> str:
    """The model, with its revision. UserError if there is none, or as `read_model`."""
    model = read_model(parser, options)
    if model is None:
        parser.error("MODEL is missing")
    return model


def add_argument_and_option(parser: ArgumentParser, metavar: str, option: str, text: str) -> None:
    """A value that may be given as an argument or as an option; `read_argument_or_option` reads it."""
    parser.add_argument(metavar.lower(), metavar=metavar, nargs="?", help=text)
    parser.add_argument(option, dest=option, metavar=metavar, help=f"the same as {metavar}")


def read_argument_or_option(parser: ArgumentParser, options: argparse.Namespace, metavar: str, option: str) -> str | None:
    """The value of `add_argument_and_option`, None if it is not given. UserError if two are given that differ."""
    values = {getattr(options, name) for name in (metavar.lower(), option)} - {None}
    if len(values) > 1:
        parser.error(f"{metavar} {getattr(options, metavar.lower())} and {option} {getattr(options, option)} differ; give one")
    return values.pop() if values else None


def add_plan_options(parser: ArgumentParser, *, pruning: bool = True) -> None:
    """The options of `read_plan_options`; `pruning` offers to prune visual tokens."""
    plan_help = "plan file, ranking.json, or a published policy such as opskip:llava-1.5-7b/12 (default: the dense model)"
    parser.add_argument("--plan", metavar="PLAN", help=plan_help)
    if pruning:
        pruning_help = "drop or merge visual tokens in addition, as divprune:keep=64 (methods: rlens_jax/plan_file.py)"
        parser.add_argument("--pruning", metavar="METHOD:SETTINGS", help=pruning_help)
    parser.add_argument("--first", metavar="LIST", help="with a ranking.json: number of layers to reduce, as attention=11,ffn=5")
    freeze_help = "in frozen layers also hold the text before the last visual token, by a mask: to repeat runs of Op-Skip"
    parser.add_argument("--freeze-text-before", action="store_true", help=freeze_help)


def read_plan_options(parser: ArgumentParser, options: argparse.Namespace) -> PlanFile:
    """The plan of the options of `add_plan_options`. UserError as `read_plan`, `parse_first`, `parse_pruning` and `Plan`."""
    plan = _read_plan(parser, options)
    if getattr(options, "pruning", None) is None:
        return plan
    if plan.pruning is not None:
        parser.error(f"{options.plan} prunes already: {plan.pruning.label()}; leave --pruning out")
    return replace(plan, pruning=parse_pruning(options.pruning))


def _read_plan(parser: ArgumentParser, options: argparse.Namespace) -> PlanFile:
    if options.plan is None:
        if options.first is not None:
            parser.error("--first needs a --plan that is a ranking.json")
        if options.freeze_text_before:
            parser.error("--freeze-text-before needs a --plan that freezes layers")
        return PlanFile()
    read = read_plan(options.plan, None if options.first is None else parse_first(options.first))
    if options.freeze_text_before:
        return replace(read, plan=replace(read.plan, freeze_text_before=True))
    if read.made_for is not None and read.made_for.holds_text:
        say("note: the authors' frozen layers also hold the text before the last visual token; --freeze-text-before repeats that")
    return read


def add_dtype_option(parser: ArgumentParser, default: Dtype | None, described: str) -> None:
    """--dtype of weights and computation; `described` is its default in words."""
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=f"of weights and computation (default: {described})")


def add_model_options(parser: ArgumentParser) -> None:
    """The model, its plan, and how to compute it."""
    add_model_argument(parser)
    add_plan_options(parser)
    add_compute_options(parser)


def add_compute_options(parser: ArgumentParser) -> None:
    """How to compute a model."""
    add_dtype_option(parser, None, "bfloat16 on an accelerator, float32 on a CPU")
    parser.add_argument("--model-shards", metavar="N", type=int, default=1, help="devices per copy of the model (default: 1)")
    parser.add_argument("--chunk", metavar="N", type=int, help="prompt tokens per step of an FFN (default: by size)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of random probes and draws (default: 0)")


def add_scoring_options(parser: ArgumentParser, output: str, new_tokens: str) -> None:
    """The data to score a model on, and how; `scoring_values` reads them. `new_tokens` is `default` of `add_decoding_options`."""
    parser.add_argument("--data", metavar="DATA", nargs="+", help="data sets (default for the embedded model: pages)")
    output_help = "folder for results (default: %(default)s)"
    parser.add_argument("--output", metavar="DIR", type=run_folder, default=Path(output), help=output_help)
    parser.add_argument("--limit", metavar="N", type=int, help="use only the first N questions of each data set")
    md5_help = "use a version of NAME.tsv that is not the published one; repeat for further files"
    parser.add_argument("--md5", metavar="NAME=SUM", action="append", default=[], help=md5_help)
    profile_help = (
        "settings of VLMEvalKit for the model on each benchmark, as vlmevalkit@e8e78f05; other options take their place"
    )
    parser.add_argument("--profile", metavar="NAME", help=profile_help)
    add_asking_options(parser)
    add_decoding_options(parser, new_tokens)
    for name, default, text in (
        ("batch-size", 8, "prompts per batch of a work group"),
        ("bootstrap-samples", 1000, "draws of the bootstrap behind the intervals"),
        ("timing-repeats", 5, "measurements per time"),
    ):
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{text} (default: %(default)s)")
    rules_help = f"VLMEvalKit's rules for benchmarks of {' or '.join(RULES)}, which differ in multiple choice and ChartQA"
    parser.add_argument("--rules", metavar="MONTH", default=CURRENT, help=f"{rules_help} (default: %(default)s)")
    images_help = "images of benchmarks as in the file, or compressed again as VLMEvalKit did until 2026 (default: %(default)s)"
    parser.add_argument("--images", choices=("as_published", "recompressed"), default="as_published", help=images_help)
    skip_help = "go on where an image or a prompt cannot be used, and count the question as wrong"
    parser.add_argument("--skip-unusable", action="store_true", help=skip_help)
    add_restart_option(parser)


def scoring_values(parser: ArgumentParser, options: argparse.Namespace, model: str, named: Iterable[str]) -> dict[str, Any]:
    """The fields `named` of an `EvaluationConfig` from the options of `add_scoring_options` and others.

    UserError without data, unless the model has data of its own, or for a sum that is none.
    """
    if options.data is None and model != EMBEDDED:
        parser.error("--data DATA is missing: name the data to score the model on")
    # Imported here: the catalogue imports the reader of datasets.
    from rlens_jax.data.benchmarks.catalogue import named_sum

    md5 = dict(named_sum(text, parser.error) for text in options.md5)
    return {**{name: getattr(options, name) for name in named}, "md5": md5, "data": tuple(options.data or [PAGES])}


def add_decoding_options(parser: ArgumentParser, default: str) -> None:
    """How greedy answers are decoded; `default` is the max length where the checkpoint says none, in words."""
    length_help = f"max tokens per answer (default: the checkpoint's, or else {default})"
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help=length_help)
    add_penalty_option(parser)


def add_penalty_option(parser: ArgumentParser) -> None:
    """--repetition-penalty."""
    penalty_help = "divides the logits of tokens that are there already; 1 is none (default: the checkpoint's)"
    parser.add_argument("--repetition-penalty", metavar="X", type=float, help=penalty_help)


def add_asking_options(parser: ArgumentParser) -> None:
    """The system prompt, and limits of the sizes of images; `given_limits` reads the latter."""
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: that of the checkpoint's chat template)")
    for name, text in LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="N", type=int, help=f"{text} (default: the checkpoint's)")


def given_limits(options: argparse.Namespace) -> dict[str, int]:
    """The limits of `add_asking_options` that are given."""
    return {name: value for name in LIMITS if (value := getattr(options, name)) is not None}


def check_decoding_options(parser: ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a max length or a penalty out of range."""
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, not {options.max_new_tokens}")
    if options.repetition_penalty is not None and not 0 < options.repetition_penalty < float("inf"):
        parser.error(f"--repetition-penalty must be a positive number, not {options.repetition_penalty}")


def add_restart_option(parser: ArgumentParser) -> None:
    """--restart, for commands that resume."""
    restart_help = "if the output folder has work of another configuration, keep it under another name and start again"
    parser.add_argument("--restart", action="store_true", help=restart_help)


def find_decoder(model: str) -> DecoderSizes:
    """The sizes of a decoder: of a published model by its short name, or of any other model. UserError if there is none."""
    if model in PUBLISHED_DECODERS:
        return PUBLISHED_DECODERS[model]
    # Imported here: a short name needs no JAX.
    from rlens_jax.checkpoints.checkpoint import read_model_kind

    known = (*PUBLISHED_DECODERS, EMBEDDED)
    if "/" not in model and not Path(model).exists() and model not in known:
        raise UserError(f"{model}: neither a folder nor one of {', '.join(known)}{suggest(model, known)}")
    decoder = read_model_kind(model).config.decoder
    sizes = {item.name: getattr(decoder, item.name) for item in fields(DecoderSizes)}
    return DecoderSizes(**sizes)


def add_json_option(parser: ArgumentParser) -> None:
    """--json, a file for the results."""
    parser.add_argument("--json", metavar="FILE", type=new_file, help="also write the results to this file")


def new_file(text: str) -> Path:
    """The path of a file to write. UserError, before any work is done, if it cannot be written; a file is made and deleted."""
    path = place(text)
    if address_of(path) is not None:
        if address_of(path.parent) is None:
            raise UserError(f"cannot write {text}: it is a bucket")
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    folder = new_folder(path.parent)
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: the folder {folder} does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    try:
        with TemporaryFile(dir=folder):  # os.access allows the superuser what a file system refuses
            return path
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def new_folder(text: str | Path) -> Path:
    """The path of a folder to write to, which may not exist yet. UserError, before any work is done, if it cannot be made."""
    folder = place(text)
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise UserError(f"cannot write to {folder}: {getattr(error, 'strerror', None) or error}") from None
    if not existing.is_dir():
        raise UserError(f"cannot write to {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: no permission to write to {existing}")
    return folder


def run_folder(text: str) -> Path:
    """The path of a folder that a run writes to and resumes from, with what a store has of it. UserError as `new_folder`."""
    return fetched_run(new_folder(text))


def input_file(text: str) -> Path:
    """The path of a file to read, which is downloaded if it is on a store; it may not exist. UserError if the store fails."""
    return fetched(place(text))


def input_folder(text: str) -> Path:
    """The path of a folder to read, with the files that a store has in it; it may not exist. UserError as `input_file`."""
    return fetched_folder(place(text), lambda name: True)


def traces_folder(text: str) -> str:
    """A folder for JAX's profiler, which writes to the local disk only; "" is none. UserError for an address."""
    check_local("--profile", text)
    return text


class _AddSetting(argparse.Action):
    """Adds a field's name, the spelling of the option and its text to one list, which keeps the order of all settings."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.settings = [*namespace.settings, (self.const, option_string, values)]


class RunParser(ArgumentParser):
    """An argument parser with an option for every field of `RunConfig`. Later options override earlier ones.

    `--help` shows the defaults that the rest of the command line would give.

    Args:
        prog, description: as in `ArgumentParser`.
        usage: the command's most important options.
        preset: configuration of the embedded model, used without `--config`. Any other model starts from the defaults of
            `RunConfig`, which are the paper's values.
        output: default of `--output`, in place of the configuration's.
    """

    def __init__(self, prog: str, usage: str, description: str, *, preset: str = "embedded", output: str | None = None):
        super().__init__(prog, description, add_help=False)
        self.usage = f"%(prog)s {usage} [--config FILE] [--GROUP.FIELD VALUE ...]"
        self.epilog = "Write lists as 16,32 (in YAML as [16, 32]) and no value as null."
        self._preset, self._output = preset, output
        self._fields: dict[str, argparse.Action] = {}
        self.set_defaults(settings=[])
        self.add_argument("-h", "--help", action="store_true", help="show this text")
        self.add_argument("--revision", help="branch, tag or commit of a model on the Hugging Face hub")
        config_help = f"YAML file with any of the fields below, or name of a preset (default: {preset} for the embedded model)"
        self._add_setting(self, CONFIG, "FILE", f"--{CONFIG}", help=config_help)
        for group in ("", *GROUPS):
            cls = GROUPS.get(group, RunConfig)
            section = self.add_argument_group(group or "run", (cls.__doc__ or "").split("\n")[0] if group else None)
            for name, hint in field_types(cls).items():
                if name not in GROUPS:
                    dotted = dotted_name(group, name)
                    spellings = [f"--{dotted}", *([SHORT[dotted]] if dotted in SHORT else [])]
                    self._fields[dotted] = self._add_setting(section, dotted, _metavar(hint), *spellings)

    def _add_setting(self, section: Any, name: str, metavar: str, *options: str, help: str = "") -> argparse.Action:
        return section.add_argument(*options, action=_AddSetting, dest="settings", const=name, metavar=metavar, help=help)

    def parse_run(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, RunConfig]:
        """All options, and the configuration of the run; with `--help`, explain every option and exit.

        Raises:
            UserError: an unknown option or field, a value of the wrong type or out of range, or an unreadable file.
        """
        options = self.parse_args(arguments)
        settings: list[Setting] = [(name, text) for name, _, text in options.settings]
        self._check_spellings(options.settings)
        if self._output is not None:
            settings.insert(0, ("output", self._output))
        given = dict(settings)
        if CONFIG not in given and given.get("model", EMBEDDED) == EMBEDDED:
            settings.insert(0, (CONFIG, self._preset))
        config = read_config(settings)
        if options.help:
            self._explain(config)
            sys.exit(0)
        run_folder(config.output)
        if options.revision is not None:
            # Imported here: the reader of checkpoints imports JAX.
            from rlens_jax.checkpoints.model_folder import at_revision

            config = replace(config, model=at_revision(config.model, options.revision))
        return options, config

    def _check_spellings(self, given: Sequence[tuple[str, str, str]]) -> None:
        for field in SHORT:
            texts = {spelling: text for name, spelling, text in given if name == field}
            if len({_from_text(field, text) for text in texts.values()}) > 1:
                self.error(f"{' and '.join(f'{spelling} {text}' for spelling, text in texts.items())} differ; give one")

    def _explain(self, config: RunConfig) -> None:
        docs = {dotted: doc for group in ("", *GROUPS) for dotted, doc in _field_docs(group).items()}
        defaults = _flat(config.to_dict())
        for dotted, action in self._fields.items():
            # argparse reads % as the start of a format.
            action.help = f"{docs[dotted]} (default: {_text(defaults[dotted])})".replace("%", "%%")
        self.print_help()


def read_config(settings: Iterable[Setting]) -> RunConfig:
    """The configuration that the settings give, in their order. UserError as `RunParser.parse_run`."""
    values: dict[str, dict[str, Any]] = {group: {} for group in ("", *GROUPS)}
    for setting, text in settings:
        new = _read_file(text) if setting == CONFIG else {setting: _from_text(setting, text)}
        for dotted, value in new.items():
            group, _, name = dotted.rpartition(".")
            values[group][name] = value
    return RunConfig.from_dict({**values.pop(""), **values})


def _hint(dotted: str) -> Any:
    group, _, name = dotted.rpartition(".")
    return field_types(GROUPS.get(group, RunConfig))[name]


def _from_text(dotted: str, text: str) -> Any:
    """The value of a field written as text. UserError if the text has the wrong type."""
    value = _converted(_hint(dotted), text)
    if not fits(_hint(dotted), value):
        raise wrong_type(dotted, _hint(dotted), text)
    return value


def _converted(hint: Any, text: str) -> Any:
    """The value of type `hint` written as `text`, or `text` if there is none."""
    kinds = alternatives(hint)
    if types.NoneType in kinds and text == "null":
        return None
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    if lists:
        items = text.removeprefix("[").removesuffix("]")
        return tuple(_converted(get_args(lists[0])[0], item.strip()) for item in items.split(",") if item.strip())
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    if str in kinds:  # also a fraction, whose text is an exact decimal
        return text
    for kind in kinds:
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _text(value: Any) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "[]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def _read_file(name: str) -> dict[str, Any]:
    """The values of a YAML file or preset by dotted name. UserError for a bad file, an unknown field or a wrong type."""
    is_file = "/" in name or name.endswith((".yaml", ".yml"))
    path = input_file(name) if is_file else preset_path(name)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold fields with values, such as `seed: 1`")
    _check_names(path, "", values, RunConfig)
    for group in values.keys() & GROUPS.keys():
        if not isinstance(values[group], dict):
            raise UserError(f"{path}: {group} must hold fields, not {shown(values[group])}")
        _check_names(path, group, values[group], GROUPS[group])
    return {dotted: _from_yaml(dotted, value) for dotted, value in _flat(values).items()}


def _from_yaml(dotted: str, value: Any) -> Any:
    hint = _hint(dotted)
    if isinstance(value, str):  # also numbers such as 1e-3, which YAML reads as text
        return _from_text(dotted, value)
    if isinstance(value, list):
        value = tuple(value)
    if not fits(hint, value):
        raise wrong_type(dotted, hint, shown(value))
    return float(value) if hint is float else value


def _check_names(path: Path, group: str, values: Mapping[Any, Any], cls: type) -> None:
    known = field_types(cls)
    for name in values:
        if name not in known:
            raise UserError(f"{path}: unknown field {dotted_name(group, str(name))}{suggest(str(name), known)}")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{field}": item for field, item in value.items()} if name in GROUPS else {name: value}
    return flat


def _field_docs(group: str) -> dict[str, str]:
    """The docstring below each field of a dataclass, by dotted name, read from the source."""
    cls = GROUPS.get(group, RunConfig)
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, doc in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            name = ast.unparse(field.target)
            docs[dotted_name(group, name)] = " ".join(str(doc.value.value).split())
    return docs


def _metavar(hint: Any) -> str:
    kind = next(kind for kind in alternatives(hint) if kind is not types.NoneType)
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "LIST"
    return {int: "N", str: "TEXT", bool: "true|false"}.get(kind, "X")
