"""The command `validate`: agreement, the place of a difference, unusable bundles, and rankings."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.qwen2_vl.model import read_config
from rlens_jax.files import json_text
from rlens_jax.parity.bundle import new_bundle
from rlens_jax.parity.dump import run_case
from rlens_jax.plan_file import PlanFile
from rlens_jax.plans import SKIP, STANDARD, TEXT, Plan, Reduction
from rlens_jax.resources import embedded_model
from rlens_jax.search.ranking_file import ranking_fields
from rlens_jax.torch_twin import reduced
from tests.checkpoints import tiny
from tests.families.qwen2_vl import hf_inputs, make_example
from tests.parity.command import refusal, validate
from tests.reporting.synthetic import synthetic_results
from tests.torch_support import save_tiny, tiny_qwen2_vl

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SMALL = Reduction(attention_range=5, active_fraction=0.3)
PLANS = (Plan(), Plan(attention=(1, 3)), Plan(ffn=(0, 2)), Plan(attention=(0, 2, 3), ffn=(1, 2, 4)))
PARTS = ([3, (6, 10), 5], [2, (4, 6), 1, (10, 2), 3, (2, 2), 11], [13])


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return tiny_qwen2_vl(0)


@pytest.fixture(scope="module")
def model(theirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", theirs)


@pytest.fixture(scope="module")
def inputs(theirs) -> dict[str, torch.Tensor]:
    config = read_config(ConfigReader(theirs.config.to_dict(), "config.json"))
    return hf_inputs([make_example(seed, parts, config) for seed, parts in enumerate(PARTS, 1)])


def write_bundle(folder: Path, cases: list[tuple[Plan, Reduction, dict[str, np.ndarray]]]) -> Path:
    framework = {"name": "pytorch", "version": torch.__version__}
    with new_bundle(folder, model="tiny", family="qwen2_vl", framework=framework, dtype="float32") as writer:
        for case in cases:
            writer.add(*case)
    return folder


@pytest.fixture(scope="module")
def good(theirs, inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All plans, with states."""
    cases = [(plan, SMALL, run_case(theirs, inputs, plan, SMALL, with_states=True)) for plan in PLANS]
    return write_bundle(tmp_path_factory.mktemp("good") / "bundle", cases)


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may spoil."""
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def edit_case(bundle: Path, number: int, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = bundle / f"case_{number:02}.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def only(bundle: Path, *numbers: int) -> None:
    """Keeps these cases."""
    edit_manifest(bundle, lambda m: m.update(cases=[m["cases"][number] for number in numbers]))


def forget_states(tensors: dict[str, np.ndarray], ending: str = "") -> None:
    for name in [name for name in tensors if name.startswith("hidden_states") and name.endswith(ending)]:
        del tensors[name]


def check_schema(report: dict[str, Any], name: str) -> None:
    schema = json.loads((files("rlens_jax.parity") / name).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)


def test_agreement(model: Path, bundle: Path, tmp_path: Path, capsys) -> None:
    edit_manifest(bundle, lambda m: m.update(weather="rain"))
    edit_manifest(bundle, lambda m: m["cases"][2].update(remark={"a": 1}))
    report, text = tmp_path / "report.json", tmp_path / "report.md"
    assert validate(model, "--reference", bundle, "--json", report, "--markdown", text) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 cases within the tolerance of 0.0001" in printed
    result = json.loads(report.read_text())
    check_schema(result, "validation.schema.json")
    assert result["within_tolerance"] is True
    assert result["reference"]["further"] == {"weather": "rain"}
    assert result["cases"][2]["further"] == {"remark": {"a": 1}}
    tokens = sum(sum(p if isinstance(p, int) else p[0] * p[1] // 4 for p in parts) for parts in PARTS)
    for case, plan in zip(result["cases"], PLANS, strict=True):
        assert case["plan"] == {"attention": list(plan.attention), "ffn": list(plan.ffn)}
        assert case["logits"]["num_positions"] == tokens
        assert 0 < case["logits"]["max_relative"] <= 1e-4
        assert case["logits"]["max_relative"] <= case["logits"]["max_absolute"]
        assert case["logits"]["argmax_agreement"] == 1
        assert 0 <= case["logits"]["mean_kl"] <= case["logits"]["max_kl"] < 1e-6
        assert [kept["layer"] for kept in case["kept_units"]] == list(plan.ffn)
        assert all(kept["smallest"] == kept["mean"] == 1 for kept in case["kept_units"])
        assert [(s["layer"], s["after"]) for s in case["hidden_states"]] == [
            (layer, after) for layer in range(5) for after in ("attention", "ffn")
        ]
        assert all(state["max_relative"] <= 1e-4 for state in case["hidden_states"])
        assert case["within_tolerance"] is True
        assert case["parting"] is None
    markdown = text.read_text()
    for part in ("| case_03.safetensors | attention 0+2-3, ffn 1-2+4 |", "weather", "rain", "pytorch", "## States"):
        assert part in markdown


WRONG = {
    "value bias": ("model.layers.2.self_attn.v_proj.bias", 2, "attention"),
    "norm before attention": ("model.layers.4.input_layernorm.weight", 4, "attention"),
    "up projection": ("model.layers.3.mlp.up_proj.weight", 3, "ffn"),
    "norm before FFN": ("model.layers.1.post_attention_layernorm.weight", 1, "ffn"),
    "embedding": ("model.embed_tokens.weight", None, None),
    "final norm": ("model.norm.weight", None, None),
}


def spoilt(model: Path, folder: Path, name: str) -> Path:
    copy = Path(shutil.copytree(model, folder / "spoilt"))
    tiny.change(copy, lambda tensors: tensors[name].__iadd__(np.float32(0.1)))
    return copy


@pytest.mark.parametrize("wrong", WRONG)
def test_where_they_part(wrong: str, model: Path, bundle: Path, tmp_path: Path, capsys) -> None:
    name, layer, operator = WRONG[wrong]
    only(bundle, 0, 3)
    report = tmp_path / "report.json"
    assert validate(spoilt(model, tmp_path, name), "--reference", bundle, "--json", report) == 1
    printed = capsys.readouterr().out
    assert "0 of 2 cases within" in printed
    places = {"embedding": "before layer 0, in the embeddings", "final norm": "after the last layer, in the final norm"}
    assert f"case_00.safetensors: they first differ {places.get(wrong, f'in layer {layer}, in {operator}')}" in printed
    result = json.loads(report.read_text())
    check_schema(result, "validation.schema.json")
    assert result["within_tolerance"] is False
    for case in result["cases"]:
        assert case["within_tolerance"] is False
        assert case["logits"]["max_relative"] > 1e-3
        assert case["logits"]["mean_kl"] > 1e-6
        assert (case["parting"]["layer"], case["parting"]["operator"]) == (layer, operator)


def parting(capsys, model: Path, bundle: Path) -> str:
    """The last complaint about a case."""
    capsys.readouterr()
    assert validate(model, "--reference", bundle) == 1
    return capsys.readouterr().out.splitlines()[-2]


def test_where_they_part_as_far_as_the_states_tell(model: Path, bundle: Path, tmp_path: Path, capsys) -> None:
    wrong = spoilt(model, tmp_path, "model.layers.3.mlp.up_proj.weight")
    only(bundle, 0)
    edit_case(bundle, 0, lambda t: forget_states(t, ".attention"))
    assert "in layer 3, in attention or ffn (the bundle has no states between" in parting(capsys, wrong, bundle)
    edit_case(bundle, 0, lambda t: t.pop("hidden_states.2"))
    assert "in one of the layers 2 to 3; the bundle has no hidden_states between" in parting(capsys, wrong, bundle)
    edit_case(bundle, 0, lambda t: (t.pop("hidden_states.3"), t.pop("hidden_states.4")))
    assert "they differ after layer 1's ffn, the last states in the bundle" in parting(capsys, wrong, bundle)
    edit_case(bundle, 0, lambda t: (forget_states(t), t.pop("embeddings")))
    assert "they differ; the bundle has no hidden_states to locate the layer" in parting(capsys, wrong, bundle)


def test_a_wrong_mask_shows_in_all_tokens_but_the_first(theirs, model: Path, inputs, tmp_path: Path, capsys) -> None:
    """Only whole layers in the bundle, and only a dense case."""
    attention = theirs.model.language_model.layers[2].self_attn
    attention.scaling *= 1.5
    tensors = run_case(theirs, inputs, Plan(), SMALL, with_states=True)
    attention.scaling /= 1.5
    forget_states(tensors, ".attention")
    line = parting(capsys, model, write_bundle(tmp_path / "bundle", [(Plan(), SMALL, tensors)]))
    assert "they first differ in layer 2, in attention" in line


@pytest.mark.parametrize(("operator", "number"), [("attention", 1), ("ffn", 2)])
def test_a_reduction_that_the_reference_lacks(
    operator: str, number: int, theirs, model: Path, inputs, tmp_path: Path, capsys
) -> None:
    """The reference forgets one layer of the plan; with the states of whole layers this shows."""
    plan, computed = PLANS[3], replace(PLANS[3], **{operator: PLANS[3].layers(operator)[:1]})
    tensors = run_case(theirs, inputs, computed, SMALL, with_states=True)
    forget_states(tensors, ".attention")
    line = parting(capsys, model, write_bundle(tmp_path / "bundle", [(plan, SMALL, tensors)]))
    assert f"they first differ in layer 2, in {operator}" in line


def test_another_range_differs_from_the_dense_case(theirs, model: Path, inputs, tmp_path: Path, capsys) -> None:
    plan, wide = PLANS[1], replace(SMALL, attention_range=6)
    cases = [(p, SMALL, run_case(theirs, inputs, p, r, with_states=True)) for p, r in ((Plan(), SMALL), (plan, wide))]
    for _, _, tensors in cases:
        forget_states(tensors, ".attention")
    bundle = write_bundle(tmp_path / "bundle", cases)
    assert "case_01.safetensors: they first differ in layer 1, in attention" in parting(capsys, model, bundle)
    for number in (0, 1):
        edit_case(bundle, number, lambda t: (forget_states(t), t.pop("embeddings")))
    assert "they differ in a layer with reduced attention: with that dense, they agree; the bundle has no" in parting(
        capsys, model, bundle
    )


def changed(model: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a model with another config.json."""
    copy = Path(shutil.copytree(model, folder / "changed"))
    fields = json.loads((copy / "config.json").read_text())
    change(fields)
    (copy / "config.json").write_text(json.dumps(fields))
    return copy


def test_an_error_is_found_in_the_operator_that_makes_it(model: Path, bundle: Path, tmp_path: Path, capsys) -> None:
    """A rotary base off by 1e-3 moves the states by less than the tolerance for some layers."""

    def other_theta(fields: dict[str, Any]) -> None:
        parameters = fields["text_config"]["rope_parameters"]
        parameters["rope_theta"] *= 1.001

    only(bundle, 0)
    line = parting(capsys, changed(model, tmp_path, other_theta), bundle)
    assert "they first differ in layer 0, in attention; relative difference" in line


def test_a_constant_that_moves_logits_by_less_than_the_tolerance(model: Path, bundle: Path, tmp_path: Path, capsys) -> None:
    wrong = changed(model, tmp_path, lambda fields: fields["text_config"].update(rms_norm_eps=3e-5))
    only(bundle, 0)
    report = tmp_path / "report.json"
    assert validate(wrong, "--reference", bundle, "--json", report) == 1
    (case,) = json.loads(report.read_text())["cases"]
    assert case["logits"]["max_relative"] < 1e-4
    assert case["parting"]["layer"] == 0


def test_constants_are_compared_as_facts(model: Path, bundle: Path, tmp_path: Path, capsys) -> None:
    only(bundle, 0)
    edit_manifest(bundle, lambda m: m.update(constants={"decoder.norm_eps": 1e-6, "decoder.num_layers": 5}))
    assert validate(model, "--reference", bundle) == 0
    edit_manifest(bundle, lambda m: m["constants"].update({"decoder.rope_theta": 1.5}))
    capsys.readouterr()
    report, text = tmp_path / "report.json", tmp_path / "report.md"
    assert validate(model, "--reference", bundle, "--json", report, "--markdown", text) == 1
    printed = capsys.readouterr().out
    assert "decoder.rope_theta: 10000.0 in the model, 1.5 in the reference" in printed
    assert printed.endswith("1 of 1 cases within the tolerance of 0.0001; 1 constants differ\n")
    result = json.loads(report.read_text())
    check_schema(result, "validation.schema.json")
    assert result["constants"] == [{"name": "decoder.rope_theta", "model": 10000.0, "reference": 1.5}]
    assert result["within_tolerance"] is False
    assert "- decoder.rope_theta: 10000.0" in text.read_text()


def test_a_wrong_selection_is_found(model: Path, bundle: Path, capsys) -> None:
    """The reference's units are imposed, so the logits agree whatever the probes choose."""
    only(bundle, 2)
    edit_manifest(bundle, lambda m: m["cases"][0].update(probe_fraction=0.3))
    line = parting(capsys, model, bundle)
    assert "case_02.safetensors: the probes choose other units in layer 0, 2: exchanged units have scores up to" in line
    assert "compare probe_fraction" in line


def test_kept_units_are_imposed_and_the_own_choice_reported(theirs, model: Path, inputs, tmp_path: Path) -> None:
    plan = PLANS[2]
    with reduced(theirs, plan, SMALL) as record, torch.no_grad():
        theirs(**inputs)
    other = {layer: torch.cat([units[:, :-3], unchosen(units)], dim=1) for layer, units in record.kept_units.items()}
    with reduced(theirs, plan, SMALL, kept_units=other), torch.no_grad():
        logits = theirs(**inputs).logits
    tensors = {name: tensor.numpy() for name, tensor in {**inputs, "logits": logits}.items()}
    tensors |= {f"kept_units.{layer}": units.numpy() for layer, units in other.items()}
    drawn = replace(SMALL, probe="random")  # other frameworks draw other probes
    assert validate(model, "--reference", write_bundle(tmp_path / "drawn", [(plan, drawn, tensors)])) == 0
    bundle, report = write_bundle(tmp_path / "bundle", [(plan, SMALL, tensors)]), tmp_path / "report.json"
    assert validate(model, "--reference", bundle, "--json", report) == 1
    (case,) = json.loads(report.read_text())["cases"]
    assert case["logits"]["max_relative"] < 1e-4
    for kept in case["kept_units"]:
        assert kept["smallest"] == pytest.approx(20 / 23)
        assert kept["mean"] == pytest.approx(20 / 23)
    del tensors["kept_units.2"]
    bundle = write_bundle(tmp_path / "partly", [(plan, SMALL, tensors)])
    assert validate(model, "--reference", bundle) == 1


def unchosen(units: torch.Tensor) -> torch.Tensor:
    """Three units that no probe chose, for each row."""
    return torch.tensor([[unit for unit in range(77) if unit not in row][:3] for row in units.tolist()])


def test_chosen_positions_and_padding(model: Path, bundle: Path, tmp_path: Path) -> None:
    """Only the named positions count, and those of padding do not, whatever is there."""
    only(bundle, 3)

    def choose(tensors: dict[str, np.ndarray]) -> None:
        lengths = tensors["attention_mask"].sum(axis=1)
        for row, length in zip(tensors["logits"], lengths, strict=True):
            row[length:] = np.nan
        last = tensors["logits"].shape[1] - 1
        positions = np.stack([[length - 1, last] for length in lengths]).astype(np.int32)
        tensors["logits_positions"] = positions
        tensors["logits"] = np.take_along_axis(tensors["logits"], positions[:, :, None], axis=1)

    edit_case(bundle, 3, choose)
    report = tmp_path / "report.json"
    assert validate(model, "--reference", bundle, "--json", report) == 0
    (case,) = json.loads(report.read_text())["cases"]
    assert case["logits"]["num_positions"] == 4  # one row is as long as the batch: its last token counts twice
    edit_case(bundle, 3, lambda t: t["logits_positions"].__isub__(np.int32(1)))
    assert validate(model, "--reference", bundle) == 1


def test_the_tolerance_is_an_option(model: Path, bundle: Path, capsys) -> None:
    only(bundle, 0)
    assert validate(model, "--reference", bundle, "--tolerance=1e-12") == 1
    assert "0 of 1 cases within the tolerance of 1e-12" in capsys.readouterr().out
    assert "--tolerance must be a positive" in refusal(capsys, model, "--reference", bundle, "--tolerance=-1")


def test_dump_and_compare_the_embedded_model(tmp_path: Path, capsys) -> None:
    bundle = tmp_path / "bundle"
    options = ("--attention=2,7", "--ffn=5", "--attention-range=8")
    assert validate("embedded", "--dump", bundle, *options) == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["format"] == "rlens-reference/1"
    assert manifest["framework"]["name"] == "pytorch"
    assert manifest["constants"]["decoder.norm_eps"] == 1e-6
    assert {"decoder.rope_theta", "decoder.rope_sections", "vision.depth"} <= manifest["constants"].keys()
    assert [case["plan"] for case in manifest["cases"]] == [
        {"attention": [], "ffn": []},
        {"attention": [2, 7], "ffn": []},
        {"attention": [], "ffn": [5]},
        {"attention": [2, 7], "ffn": [5]},
    ]
    tensors = load_file(bundle / "case_03.safetensors")
    assert tensors["kept_units.5"].shape[0] == tensors["input_ids"].shape[0] == 2
    assert validate("embedded", "--reference", bundle) == 0
    assert "4 of 4 cases" in capsys.readouterr().out
    dense, hollow = (load_file(bundle / f"case_0{number}.safetensors")["logits"] for number in (0, 1))
    assert np.abs(dense - hollow).max() > 1e-3
    assert "exists already" in refusal(capsys, "embedded", "--dump", bundle)


SINGLE = Plan.of({0: 2, 1: TEXT, 2: SKIP, 4: SKIP}, {0: 0.5, 1: SKIP, 2: STANDARD, 4: SKIP})


def test_levels_of_single_layers(theirs, inputs, model: Path, tmp_path: Path, capsys) -> None:
    case = (SINGLE, SMALL, run_case(theirs, inputs, SINGLE, SMALL, with_states=True))
    bundle, report = write_bundle(tmp_path / "bundle", [case]), tmp_path / "report.json"
    assert validate(model, "--reference", bundle, "--json", report) == 0
    result = json.loads(report.read_text())
    check_schema(result, "validation.schema.json")
    (found,) = result["cases"]
    assert found["plan"] == SINGLE.fields()
    assert [kept["layer"] for kept in found["kept_units"]] == [0, 2]
    attention, ffn = SINGLE.reduced("attention"), SINGLE.reduced("ffn")
    wrong = {
        "layer 0, in attention": Plan.of({**attention, 0: 3}, ffn),
        "layer 1, in ffn": Plan.of(attention, {0: 0.5, 2: STANDARD, 4: SKIP}),
    }
    for place, plan in wrong.items():
        edit_manifest(bundle, lambda m, plan=plan: m["cases"][0].update(plan=plan.fields()))
        assert validate(model, "--reference", bundle) == 1
        assert place in capsys.readouterr().out
    edit_manifest(bundle, lambda m: m["cases"][0]["plan"].update(ffn_levels=[{"layers": [0], "fraction": 0.4}]))
    assert "kept_units.0 has shape [3, 39], expected integers [3, 31]" in refusal(capsys, model, "--reference", bundle)


def test_a_plan_file_with_levels_is_dumped(tmp_path: Path, capsys, monkeypatch) -> None:
    dumped: list[Any] = []
    monkeypatch.setattr("rlens_jax.parity.dump.dump", lambda *arguments: dumped.append(arguments[2]))
    plan = tmp_path / "plan.json"
    plan.write_text(json_text(PlanFile(SINGLE, SMALL, 12).document()))
    assert validate("embedded", "--dump", tmp_path / "bundle", "--plan", plan) == 0
    assert dumped == [[Plan(), SINGLE]]
    plan.write_text(json_text(PlanFile(replace(SINGLE, freeze_text_before=True), SMALL, 12).document()))
    assert "bundles compare half layers" in refusal(capsys, "embedded", "--dump", tmp_path / "bundle", "--plan", plan)


# Bad input


def drop(name: str) -> Callable[[Path], None]:
    return lambda bundle: edit_manifest(bundle, lambda m: m.pop(name))


def in_case(**fields: object) -> Callable[[Path], None]:
    return lambda bundle: edit_manifest(bundle, lambda m: m["cases"][1].update(fields))


def rename_field(old: str, new: str) -> Callable[[Path], None]:
    return lambda bundle: edit_manifest(bundle, lambda m: m["cases"][1].update({new: m["cases"][1].pop(old)}))


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda bundle: edit_case(bundle, 3, lambda t: t.update({name: np.ascontiguousarray(change(t[name]))}))


def without(name: str) -> Callable[[Path], None]:
    return lambda bundle: edit_case(bundle, 3, lambda t: t.pop(name))


def add(name: str, value: np.ndarray) -> Callable[[Path], None]:
    return lambda bundle: edit_case(bundle, 3, lambda t: t.update({name: value}))


def cut(file: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / file).write_bytes((bundle / file).read_bytes()[:-3])


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[0, 0] = value
        return array

    return change


BAD = {
    "another format version": (
        lambda b: edit_manifest(b, lambda m: m.update(format="rlens-reference/2")),
        "has the format 'rlens-reference/2', this version reads 'rlens-reference/1'",
    ),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "manifest.json: no such file"),
    "no JSON": (cut("manifest.json"), "manifest.json: not valid JSON"),
    "missing field": (drop("family"), "the field family is missing"),
    "constants": (lambda b: edit_manifest(b, lambda m: m.update(constants=[1])), "constants must be an object"),
    "unknown constant": (
        lambda b: edit_manifest(b, lambda m: m.update(constants={"decoder.norm_esp": 1})),
        "constants: 'decoder.norm_esp' is not known (did you mean 'decoder.norm_eps'?)",
    ),
    "field twice": (lambda b: (b / "manifest.json").write_text('{"format": 1, "format": 1}'), "field 'format' is given twice"),
    "a folder as file": (in_case(file=".."), "file must be the name of a file in the bundle"),
    "no cases": (lambda b: edit_manifest(b, lambda m: m.update(cases=[])), "cases is empty"),
    "missing field of a case": (rename_field("plan", "x"), "case 1: the field plan is missing"),
    "misspelt field of a case": (
        rename_field("attention_range", "atention_range"),
        "case 1: the field attention_range is missing (is it 'atention_range'?)",
    ),
    "another family": (
        lambda b: edit_manifest(b, lambda m: m.update(family="llava_onevision")),
        "the bundle is for 'llava_onevision', the model is a 'qwen2_vl'",
    ),
    "no version": (lambda b: edit_manifest(b, lambda m: m["framework"].pop("version")), "framework: the field version"),
    "file elsewhere": (in_case(file="../x.safetensors"), "file must be the name of a file in the bundle"),
    "missing file": (in_case(file="x.safetensors"), "x.safetensors: no such file, though manifest.json names it"),
    "cut file": (cut("case_03.safetensors"), "case_03.safetensors: not a complete safetensors file"),
    "layer twice": (in_case(plan={"attention": [1, 1], "ffn": []}), "plan.attention names layer 1 twice"),
    "layer out of range": (
        in_case(plan={"attention": [], "ffn": [5]}),
        "the plan reduces ffn in layer 5, but the model has 5 layers",
    ),
    "plan without ffn": (in_case(plan={"attention": [1], "fnn": []}), "the field ffn is missing (is it 'fnn'?)"),
    "another operator": (in_case(plan={"attention": [1], "ffn": [], "mlp": []}), "plan has no field 'mlp'"),
    "fraction": (in_case(active_fraction=2), "active_fraction must be a decimal number above 0"),
    "window": (in_case(window="ordinals"), "did you mean 'ordinal'?"),
    "random probes": (
        lambda b: (without("kept_units.2")(b), edit_manifest(b, lambda m: m["cases"][3].update(probe="random"))),
        "so kept_units.2 is needed",
    ),
    "no logits": (without("logits"), "case_03.safetensors: has no logits"),
    "logits of another vocabulary": (tensor("logits", lambda a: a[:, :, 1:]), "logits has shape"),
    "logits of another length": (tensor("logits", lambda a: a[:, 1:]), "logits has shape"),
    "logits in float16": (tensor("logits", lambda a: a.astype(np.float16)), "logits has dtype F16, expected F32"),
    "logits that are no numbers": (tensor("logits", with_value(np.nan)), "logits holds NaN"),
    "positions outside": (
        add("logits_positions", np.array([[99], [0], [0]])),
        "logits_positions has positions outside the sequence",
    ),
    "unknown tensor": (
        add("pixel_value", np.zeros(3, np.float32)),
        "the tensor pixel_value is not known (did you mean 'pixel_values'?)",
    ),
    "video": (add("video_grid_thw", np.zeros((1, 3), np.int64)), "the tensor video_grid_thw is not known"),
    "padded on the left": (
        tensor("attention_mask", lambda a: a[:, ::-1]),
        "attention_mask is not 1 ... 1 0 ... 0 in each row; bundles are right-padded",
    ),
    "no tokens": (without("input_ids"), "holds no input_ids"),
    "token outside": (tensor("input_ids", with_value(199)), "outside the model's vocabulary of 199"),
    "patches of another size": (tensor("pixel_values", lambda a: a[:, 1:]), "pixel_values has shape"),
    "a patch too few": (tensor("pixel_values", lambda a: a[1:]), "patches where image_grid_thw has"),
    "an image too few": (
        lambda b: (tensor("image_grid_thw", lambda a: a[1:])(b), tensor("pixel_values", lambda a: a[60:])(b)),
        "row 0 of input_ids has 15 image tokens, to which its images do not add up",
    ),
    "two frames": (tensor("image_grid_thw", with_value(2)), "image_grid_thw has 2 frames; only images"),
    "token types": (tensor("mm_token_type_ids", with_value(1)), "mm_token_type_ids"),
    "unit out of range": (tensor("kept_units.2", with_value(77)), "kept_units.2 names a unit twice or one outside"),
    "unit twice": (tensor("kept_units.2", np.zeros_like), "kept_units.2 names a unit twice"),
    "too few units": (tensor("kept_units.2", lambda a: a[:, 1:]), "kept_units.2 has shape [3, 22]"),
    "units of a dense layer": (add("kept_units.0", np.zeros((3, 23), np.int64)), "chooses no FFN units in layer 0"),
    "states of another width": (tensor("hidden_states.1", lambda a: a[:, :, 1:]), "hidden_states.1 has shape"),
    "states of layer 5": (add("hidden_states.5", np.zeros((3, 43, 60), np.float32)), "hidden_states.5 is of a layer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bundle(case: str, model: Path, bundle: Path, capsys) -> None:
    spoil, expected = BAD[case]
    spoil(bundle)
    assert expected in refusal(capsys, model, "--reference", bundle)


BAD_OPTIONS = {
    "nothing to do": ([], "choose one of --reference"),
    "two things": (["embedded", "--reference=a", "--dump=b"], "choose one of --reference"),
    "no model": (["--reference=a"], "--reference needs a MODEL"),
    "a model for rankings": (["embedded", "--rankings", "1,0", "0,1"], "--rankings takes no MODEL"),
    "no such bundle": (["embedded", "--reference=nowhere"], "nowhere: no such folder"),
    "no such model": (["embeded", "--dump=x"], "did you mean 'embedded'"),
    "layer out of range": (["embedded", "--dump=x", "--ffn=12"], "layer 12"),
    "misspelt": (["embedded", "--referense=x"], "did you mean '--reference'?"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = BAD_OPTIONS[case]
    assert expected in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_dump_without_pytorch(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rlens_jax.torch_twin", None)
    assert "install the extra torch" in refusal(capsys, "embedded", "--dump", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_dump_of_a_converted_folder(tmp_path: Path, capsys) -> None:
    (tmp_path / "model" / "orbax").mkdir(parents=True)
    shutil.copy(embedded_model() / "config.json", tmp_path / "model")
    message = refusal(capsys, tmp_path / "model", "--dump", tmp_path / "bundle")
    assert "convert it back with --to-hf" in message


# Rankings


def ranking_json(folder: Path, **rankings: list[int]) -> Path:
    path = folder / "ranking.json"
    results = synthetic_results(num_layers=4, samples=20, operators=tuple(rankings))
    path.write_text(json_text({**ranking_fields(results), "rankings": rankings}))
    return path


def test_rankings(tmp_path: Path, capsys) -> None:
    ours = ranking_json(tmp_path, attention=[3, 2, 1, 0], ffn=[3, 1, 2, 0])
    listed, report, markdown = tmp_path / "list.txt", tmp_path / "report.json", tmp_path / "report.md"
    listed.write_text("3\n1\n0\n2\n")
    assert validate("--rankings", ours, listed, "--json", report, "--markdown", markdown) == 0
    result = json.loads(report.read_text())
    check_schema(result, "rankings.schema.json")
    attention, ffn = result["comparisons"]
    assert attention == {
        "name": "attention",
        "a": [3, 2, 1, 0],
        "b": [3, 1, 0, 2],
        "kendall_tau": pytest.approx((4 - 2) / 6),
        "overlaps": [1, 0.5, pytest.approx(2 / 3), 1],
        "places_of_a_in_b": [1, 4, 2, 3],
        "places_of_b_in_a": [1, 3, 4, 2],
    }
    assert ffn["kendall_tau"] == pytest.approx((5 - 1) / 6)
    printed = capsys.readouterr().out
    assert "Kendall's tau 0.333" in printed
    assert "first k in common 1:100% 2:50% 3:67% 4:100%" in printed
    assert "A's layers, place in B: 3:1 2:4 1:2 0:3" in printed
    assert "| 2 | 2 | 4 |" in markdown.read_text()


def test_rankings_of_the_same_operators_are_compared(tmp_path: Path, capsys) -> None:
    (tmp_path / "b").mkdir()
    a, b = (ranking_json(tmp_path, ffn=[3, 2, 1, 0]), ranking_json(tmp_path / "b", ffn=[0, 1, 2, 3], attention=[0, 1, 2, 3]))
    assert validate("--rankings", a, b) == 0
    assert capsys.readouterr().out.startswith("ffn\nKendall's tau -1.000")


def test_lists_that_are_not_complete(capsys) -> None:
    assert validate("--rankings", "27,26,25", "27 20 26", "--layers=28") == 0
    printed = capsys.readouterr().out
    assert "Kendall's tau 1.000" in printed
    assert "A's layers, place in B: 27:1 26:3 25:-" in printed


def test_a_list_longer_than_a_file_name(capsys) -> None:
    layers = " ".join(map(str, range(100)))
    assert validate("--rankings", layers, layers) == 0
    assert "Kendall's tau 1.000" in capsys.readouterr().out


BAD_RANKINGS = {
    "twice": (["2,1,1", "0,1,2"], "the list: names layer 1 twice"),
    "out of range": (["0,1,3", "0,1,2"], "layer 3 is out of range, the model has 3 layers (0-2)"),
    "negative": (["0,1,-2", "0,1,2"], "layer -2 is out of range"),
    "no number": (["0,1,two", "0,1,2"], "0,1,two: neither a file nor a list"),
    "empty": (["", "0,1"], "is an empty list"),
    "nothing in common": (["0,1", "2,3", "--layers=4"], "fewer than two layers in common"),
    "no such file": (["nowhere.json", "0,1"], "nowhere.json: neither a file nor a list"),
}


@pytest.mark.parametrize("case", BAD_RANKINGS)
def test_bad_rankings(case: str, capsys) -> None:
    arguments, expected = BAD_RANKINGS[case]
    assert expected in refusal(capsys, "--rankings", *arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 0 x", "'x' is no layer number"),
        ("[1, 0, 1.5]", "1.5 is no layer number"),
        ("[1, 0", "not valid JSON"),
        ('{"schema": "other/1"}', "its schema must be 'rlens-ranking/1', not 'other/1'"),
        ('{"schema": "rlens-ranking/1"}', "'rankings' is a required property"),
    ],
)
def test_bad_ranking_file(text: str, expected: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "list"
    path.write_text(text)
    assert expected in refusal(capsys, "--rankings", path, "1,0")


def test_layers_of_another_model(tmp_path: Path, capsys) -> None:
    ours = ranking_json(tmp_path, ffn=[3, 2, 1, 0])
    assert "layer 4 is out of range" in refusal(capsys, "--rankings", ours, "4,3,2,1,0")
    message = refusal(capsys, "--rankings", ours, "3,2,1,0", "--layers=5")
    assert "models with 4 and 5 layers" in message
