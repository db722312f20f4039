import ast
import dataclasses
from pathlib import Path

import pytest
import yaml

import rlens_jax
from rlens_jax.commands.options import RunParser
from rlens_jax.config import GROUPS, ComputeConfig, DataConfig, RunConfig, SearchConfig
from rlens_jax.errors import UserError
from rlens_jax.plans import Plan, Reduction


def load_config(arguments):
    """The configuration that a command line gives."""
    return RunParser("rank", "", "").parse_run(arguments)[1]


def test_without_options_it_is_the_embedded_preset():
    config = load_config([])
    assert config.model == "embedded"
    assert config.reduction == Reduction(attention_range=16, active_fraction=0.02)
    assert config.compute.text_slots == (80,)
    assert config.compute.visual_slots == (128,)
    assert config.compute.patch_slots == (512,)


@pytest.mark.parametrize("preset", ["embedded", "studies"])
def test_another_model_starts_from_the_paper_s_values(preset):
    def load(*options):
        return RunParser("rank", "", "", preset=preset).parse_run(options)[1]

    mine = load("--data=my.jsonl", "--model", "FOLDER")
    assert mine == RunConfig(model="FOLDER", data=DataConfig(source="my.jsonl"))
    assert mine.reduction == Reduction(attention_range=256, active_fraction=0.2, probe_fraction=0.1)
    assert mine.compute.dtype is None  # by the device
    for toy in (load("--model=embedded"), load("--model", "FOLDER", "--config", "embedded", "--model=FOLDER")):
        assert toy.reduction.attention_range == 16
        assert toy.compute.dtype == "float32"


@pytest.mark.parametrize(("text", "value"), [("null", None), ("bfloat16", "bfloat16")])
def test_a_field_can_be_left_open(text, value):
    assert load_config(["--compute.dtype", text]).compute.dtype == value


def test_options_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 7\nsearch:\n  penalty: 3\n  operators: [ffn]\n")
    config = load_config(["--config", str(path), "--search.penalty=1.5", "--search.base_attention", "3,4"])
    assert (config.seed, config.search.penalty, config.search.operators) == (7, 1.5, ("ffn",))
    assert config.search.base() == Plan(attention=(3, 4))
    assert config.reduction == Reduction()
    assert config.compute == ComputeConfig()


def test_shortcuts_and_one_word_lists():
    config = load_config(["--data", "my.jsonl", "--model", "m", "--output=o", "--search.operators", "attention"])
    assert (config.data.source, config.model, config.output) == ("my.jsonl", "m", "o")
    assert config.search.operators == ("attention",)


def test_what_it_writes_it_reads_back(tmp_path):
    config = load_config(["--seed", "5", "--compute.text_slots", "16,64", "--search.position_layers", "0"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(["--config", str(path)]) == config


def test_an_exact_decimal_stays_one():
    assert load_config(["--reduction.probe_fraction", "0.07"]).reduction.probe_count(100) == 7


BAD_OPTIONS = {
    "--search.penalti 3": r"unknown option --search.penalti \(did you mean '--search.penalty'\?\)",
    "--penalty 3": "did you mean '--search.penalty'",
    "--search.position-layers 3": "did you mean '--search.position_layers'",
    "--seed": "argument --seed: expected one argument",
    "leftover": "unexpected argument 'leftover'",
    "--search.penalty abc": "search.penalty must be a number, not abc",
    "--search.penalty nan": "search.penalty must be a number, not nan",
    "--search.penalty -1": "search.penalty must be at least 0, not -1.0",
    "--search.position_layers 1.5": "search.position_layers must be a whole number or null, not 1.5",
    "--search.position_layers -1": "search.position_layers must be at least 0, not -1",
    "--search.change relativ": r"search.change must be one of relative, absolute.*did you mean 'relative'",
    "--search.operators fn": r"search.operators must be .*attention, ffn, not fn \(did you mean 'ffn'\?\)",
    "--search.operators []": "search.operators must name at least one",
    "--search.operators ffn,ffn": "search.operators names an operator twice",
    "--search.max_new_tokens 0": "search.max_new_tokens must be at least 1, not 0",
    "--search.one_shot_by kl": "search.one_shot_by kl needs search.method one_shot",
    "--search.method one_shot --search.one_shot_by kl --search.objective generation": "it needs search.objective teacher_forced",
    "--search.base_ffn 3": "search.base_ffn reduces ffn in every plan; then search.operators must not rank ffn too",
    "--search.operators ffn --search.base_attention 3,3": "search.base_attention must be different",
    "--search.operators ffn --search.base_attention [-1]": "search.base_attention must be different",
    "--reduction.attention_range -5": "reduction.attention_range must be a whole number from 1 to 2147483647, not -5",
    "--reduction.active_fraction 2": "reduction.active_fraction must be .* at most 1",
    "--reduction.active_fraction x": "reduction.active_fraction must be a decimal number",
    "--reduction.probe best": "reduction.probe must be one of strided, random, not best",
    "--data.validation_samples 0": "data.validation_samples must be at least 1, not 0",
    "--data.held_out_share 1": "data.held_out_share must be above 0 and below 1, not 1.0",
    "--compute.text_slots []": "compute.text_slots must be at least one size",
    "--compute.visual_slots 64,32": r"compute.visual_slots must be .* ascending, not \[64, 32\]",
    "--compute.patch_slots 0,32": "compute.patch_slots must be at least one size, each at least 1",
    "--compute.text_slots 32,a": "compute.text_slots must be a list of whole numbers",
    "--compute.dtype float16": "compute.dtype must be one of float32, bfloat16 or null, not float16",
    "--compute.batch_size -1": "compute.batch_size must be at least 0, not -1",
    "--compute.state_memory_gb -1": "compute.state_memory_gb must be at least 0",
    "--report.random_rankings -1": "report.random_rankings must be at least 0, not -1",
    "--hosts.num_processes 0": "hosts.num_processes must be at least 1, not 0",
    "--hosts.num_processes 2": "hosts.coordinator and hosts.process_id must be set too",
    "--hosts.process_id 0": "hosts.coordinator and hosts.num_processes must be set too",
    "--hosts.coordinator h --hosts.num_processes 2 --hosts.process_id 0": "coordinator must be HOST:PORT, not 'h'",
    "--hosts.coordinator h:99999 --hosts.num_processes 2 --hosts.process_id 0": "must be HOST:PORT, not 'h:99999'",
    "--hosts.coordinator h:80 --hosts.num_processes 2 --hosts.process_id 2": "below hosts.num_processes, which is 2",
    "--hosts.heartbeat_seconds 0": "hosts.heartbeat_seconds must be at least 1, not 0",
    "--seed true": "seed must be a whole number, not true",
    "--seed -1": "seed must be at least 0, not -1",
    "--config missing.yaml": "cannot read missing.yaml: No such file or directory",
    "--config embeded": "did you mean 'embedded'",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_answered_in_one_line(options, capsys):
    with pytest.raises(UserError, match=BAD_OPTIONS[options]) as raised:
        load_config(options.split())
    assert "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", "")


BAD_FILES = {
    "search:\n  penalti: 2\n": r"mine.yaml: unknown field search.penalti \(did you mean 'penalty'\?\)",
    "modle: x\n": r"mine.yaml: unknown field modle \(did you mean 'model'\?\)",
    "search:\n  penalty: [a]\n": r"search.penalty must be a number, not \['a'\]",
    "search: 3\n": "mine.yaml: search must hold fields, not 3",
    "- 1\n": "mine.yaml must hold fields with values",
    "search: [\n": "mine.yaml: not valid YAML",
    "compute:\n  batch_size: 1.5\n": "compute.batch_size must be a whole number, not 1.5",
    "reduction:\n  active_fraction: 1.2\n": "reduction.active_fraction must be a decimal number",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files_are_answered_in_one_line(text, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=BAD_FILES[text]) as raised:
        load_config(["--config", str(path)])
    assert "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataConfig(validation_samples="many"),
        lambda: DataConfig(cache=3),
        lambda: SearchConfig(operators="ffn"),
        lambda: ComputeConfig(text_slots=(1.5,)),
        lambda: ComputeConfig(state_memory_gb=float("inf")),
        lambda: RunConfig(model=""),
        lambda: RunConfig(search=DataConfig()),
    ],
)
def test_values_given_in_code_are_checked_too(make):
    with pytest.raises(UserError):
        make()


def test_help_explains_every_field_with_the_preset_s_default(capsys):
    with pytest.raises(SystemExit) as end:
        load_config(["--help", "--search.penalty", "1.25"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for group, cls in GROUPS.items():
        for field in dataclasses.fields(cls):
            _, option, rest = text.partition(f" --{group}.{field.name} ")
            assert option, field.name
            explanation = rest.partition("(default:")[0]
            assert len(explanation.split()) > 4, f"{group}.{field.name}: {explanation}"
    assert "(default: 16)" in text
    assert "(default: 1.25)" in text


def test_a_journal_depends_on_what_decides_results_and_on_nothing_else():
    def print_of(*options):
        return load_config(options).deciding_settings()

    same = print_of()
    for options in (
        ["--output", "elsewhere"],
        ["--model", "a/copy", "--config", "embedded", "--model", "a/copy"],
        ["--data", "a/copy.jsonl"],
        ["--data.cache", "c"],
        ["--compute.compilation_cache", "c"],
        ["--compute.state_memory_gb", "9"],
        ["--compute.cpu_devices", "3"],
        ["--compute.ffn_path", "masked"],
        ["--report.random_rankings", "3"],
        ["--report.bootstrap_samples", "9"],
        ["--hosts.coordinator", "h:80", "--hosts.num_processes", "2", "--hosts.process_id", "0"],
        ["--hosts.num_processes", "1"],
    ):
        assert print_of(*options) == same, options
    for options in (
        ["--seed", "1"],
        ["--reduction.attention_range", "8"],
        ["--search.penalty", "1"],
        ["--search.objective", "generation"],
        ["--data.validation_samples", "10"],
        ["--compute.dtype", "bfloat16"],
        ["--compute.batch_size", "5"],
    ):
        assert print_of(*options) != same, options


def test_what_is_portable_knows_no_folder_and_no_host_of_this_run():
    folders = ("--output", "--data.cache", "--data.benchmarks", "--compute.compilation_cache")
    config = load_config([part for option in folders for part in (option, "here")])
    assert "here" not in str(config.portable())
    assert "hosts" not in config.portable()
    assert "here" in str(config.to_dict())


def reads(tree):
    """(owner, field) of every attribute read, the same for `config.search.penalty` and `search.penalty`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            yield owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", ""), node.attr


def test_every_field_is_read_by_some_code():
    """A field that no code reads has no effect. Reads by its own checks do not count."""
    package, read = Path(rlens_jax.__file__).parent, set()
    for path in sorted(package.rglob("*.py")):
        if path != package / "config.py":
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
                    node.body = []
            read |= {(owner.lstrip("_"), field) for owner, field in reads(tree)}
    # Reduction's own methods read some of its fields, SearchConfig.base both base plans, SearchConfig.alpha the penalty, and
    # JointConfig.levels the levels of both operators.
    read |= {("reduction", field) for owner, field in read if owner == "self"}
    if ("search", "base") in read:
        read |= {("search", "base_attention"), ("search", "base_ffn")}
    if ("search", "alpha") in read:
        read.add(("search", "penalty"))
    if ("joint", "levels") in read:
        read |= {("joint", "attention_levels"), ("joint", "ffn_levels")}
    unread = [
        f"{group}.{field.name}"
        for group, cls in {"config": RunConfig, **GROUPS}.items()
        for field in dataclasses.fields(cls)
        if (group, field.name) not in read
    ]
    assert unread == []


@pytest.mark.parametrize(
    "name", ["qwen2_vl_7b", "llava_onevision_7b", "internvl2_8b", "minicpm_v_2_6", "llava_1_5_7b", "llava_next_7b"]
)
def test_there_is_a_preset_for_each_model_of_the_paper_and_for_later_ones(name):
    config = load_config([f"--config={name}"])
    assert config.model == f"checkpoints/{name}"
    assert config.reduction.attention_range == 256
    assert config.reduction.active_fraction == pytest.approx(0.2)
