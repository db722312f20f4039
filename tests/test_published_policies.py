"""Policies of Op-Skip and ShortV as plans: by name, from files in their own format, and for the right model only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlens_jax.commands.options import add_plan_options, read_plan_options
from rlens_jax.console import ArgumentParser
from rlens_jax.errors import UserError
from rlens_jax.flops import DecoderSizes, prefill_summary
from rlens_jax.plan_file import PlanFile, read_plan
from rlens_jax.plans import SKIP, Plan

FACTS = Path(__file__).parents[1].parent / "shared" / "policies"
"""What the authors publish, where the work place has it."""
LLAVA = DecoderSizes(32, 4096, 32, 32, 128, 11008, qkv_bias=False)
QWEN = DecoderSizes(28, 3584, 28, 4, 128, 18944, qkv_bias=True)
QWEN3 = DecoderSizes(36, 4096, 32, 8, 128, 12288, qkv_bias=False, qk_norm=True)
OP_SKIP = {
    "llava-1.5-7b": (8, 12, 16, 20, 24, 28, 32),
    "llava-v1.6-vicuna-7b": (8, 12, 16, 20, 24, 28, 32),
    "qwen2.5-vl-7b": (8, 12, 16, 20, 24, 28),
    "qwen3-vl-8b": (12, 16, 20, 24, 28, 32, 36),
}
SHORT_V = {"llava-1.5-7b": 19, "llava-1.5-13b": 24, "llava-v1.6-vicuna-7b": 19, "llava-v1.6-vicuna-13b": 24}
FREEZE = tuple(range(24, 32))


def skipping(attention: tuple[int, ...], ffn: tuple[int, ...]) -> Plan:
    return Plan.of(dict.fromkeys(attention, SKIP), dict.fromkeys(ffn, SKIP))


def own_file(**changes: Any) -> dict[str, Any]:
    """Op-Skip's file of a preset; `...` leaves a field out."""
    fields = {
        "model_family": "llava",
        "checkpoint": "liuhaotian/llava-v1.5-7b",
        "num_layers": 32,
        "preset": 12,
        "budget": 12,
        "attention_only": [2],
        "ffn_only": [0, 21, 23],
        "freeze": list(FREEZE),
        "freeze_scope": "prefix_through_visual",
        "mlp_chunk_size": 0,
        "source": "a script",
    } | changes
    return {name: value for name, value in fields.items() if value is not ...}


def written(folder: Path, value: Any) -> Path:
    path = folder / "policy.json"
    path.write_text(json.dumps(value))
    return path


def test_what_they_skip_is_what_our_plan_skips() -> None:
    """Their `attention_only` is about what remains."""
    plan = read_plan("opskip:llava-1.5-7b/12").plan
    assert plan == skipping(attention=(0, 21, 23, *FREEZE), ffn=(2, *FREEZE))
    assert plan.frozen == FREEZE
    assert plan.label() == "attention skipped 0+21+23, ffn skipped 2, frozen 24-31"
    assert read_plan("shortv:llava-1.5-7b").plan.label() == "frozen 0+2-3+12+17-31"


def test_every_published_policy_reads() -> None:
    for model, presets in OP_SKIP.items():
        plans = [read_plan(f"opskip:{model}/{preset}").plan for preset in presets]
        assert [len({*plan.reduced("attention"), *plan.reduced("ffn")}) for plan in plans] == list(presets)
        assert len(set(plans)) == len(presets)
    for model, layers in SHORT_V.items():
        assert len(read_plan(f"shortv:{model}").plan.frozen) == layers


@pytest.mark.skipif(not FACTS.is_dir(), reason="needs the published facts")
def test_the_policies_are_the_published_ones() -> None:
    published = json.loads((FACTS / "opskip.json").read_text())["families"]
    for model, family in zip(OP_SKIP, published.values(), strict=True):
        frozen = family["freeze_in_every_preset"]
        for preset, lists in family["presets"].items():
            read = read_plan(f"opskip:{model}/{preset}")
            assert read.plan == skipping((*lists["ffn_only"], *frozen), (*lists["attention_only"], *frozen))
            assert read.num_layers == family["num_layers"]
            assert read.made_for.name == family["checkpoint"]
    published = json.loads((FACTS / "shortv.json").read_text())["models"]
    for model, facts in zip(SHORT_V, published.values(), strict=True):
        read = read_plan(f"shortv:{model}")
        assert read.plan == skipping(tuple(facts["layers"]), tuple(facts["layers"]))
        assert read.num_layers == facts["num_layers"]


def test_files_in_their_own_format(tmp_path) -> None:
    named = read_plan("opskip:llava-1.5-7b/12")
    assert read_plan(written(tmp_path, own_file())) == named
    shorter = own_file(preset=..., budget=..., source=..., mlp_chunk_size=..., freeze_scope=..., checkpoint=...)
    assert read_plan(written(tmp_path, shorter)).plan == named.plan
    earlier = read_plan(written(tmp_path, own_file(freeze_scope="visual")))
    assert earlier.plan == named.plan and not earlier.made_for.holds_text and named.made_for.holds_text
    listed = read_plan(written(tmp_path, [31, 29, 0]))
    assert listed == PlanFile(skipping((0, 29, 31), (0, 29, 31)))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (own_file(budget=11), "budget is 11, but attention_only, ffn_only, freeze name 12 layers"),
        (own_file(freezes=[1]), "unknown field 'freezes' (did you mean 'freeze'?)"),
        (own_file(num_layers=...), "the field num_layers is missing"),
        (own_file(num_layers=True), "num_layers must be of the type int, not True"),
        (own_file(num_layers=28), "the plan reduces attention in layer 31, but the model has 28 layers"),
        (own_file(attention_only=[2, 24], budget=13), "freeze names layer 24, which attention_only names already"),
        (own_file(ffn_only=[0, 0, 1]), "ffn_only names layer 0, which ffn_only names already"),
        (own_file(freeze="24-31"), "freeze must be of the type list, not '24-31'"),
        (own_file(freeze=[-1]), "freeze: a layer must be a whole number from 0 to 999, not -1"),
        (own_file(freeze_scope="all"), "freeze_scope must be prefix_through_visual or visual, not 'all'"),
        ([], "a list of layers to freeze, as ShortV has it, must name a layer"),
        ([1, "2"], "freeze: a layer must be a whole number from 0 to 999, not '2'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(value, problem, tmp_path) -> None:
    path = written(tmp_path, value)
    with pytest.raises(UserError) as error:
        read_plan(path)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("opskip:llava-1.5-7", "opskip has no policy for 'llava-1.5-7' (did you mean 'llava-1.5-7b'?); there are llava-1.5-7b, "),
        ("opskip:llava-1.5-7b", "has no such preset for llava-1.5-7b: add a number, as in opskip:llava-1.5-7b/8; there are 8,"),
        ("opskip:llava-1.5-7b/13", "add a number, as in opskip:llava-1.5-7b/8; there are 8, 12, 16, 20, 24, 28, 32"),
        ("shortv:llava-1.5-7b/19", "shortv has one policy for each model: write shortv:llava-1.5-7b, not shortv:"),
        ("shortv:", "shortv has no policy for ''"),
    ],
)
def test_a_policy_that_does_not_exist(name, problem) -> None:
    with pytest.raises(UserError) as error:
        read_plan(name)
    assert problem in str(error.value)
    with pytest.raises(UserError, match=r"first layers can be chosen from a ranking.json only"):
        read_plan("shortv:llava-1.5-7b", {"attention": 3})


def test_a_policy_of_another_model() -> None:
    read = read_plan("opskip:llava-1.5-7b/12")
    read.validate(LLAVA, "llava")
    read.validate(LLAVA)
    for sizes, model_type, problem in (
        (QWEN, "llava", "for liuhaotian/llava-v1.5-7b, which has 32 layers, but this model has 28"),
        (LLAVA, "llava_next", "a model of the type llava, but this one is of the type llava_next"),
        (replace(LLAVA, ffn_width=14336), "llava", r"have the widths (4096, 11008), but this model has (4096, 14336)"),
    ):
        with pytest.raises(UserError) as error:
            read.validate(sizes, model_type)
        assert problem in str(error.value)
    with pytest.raises(UserError, match="this one is of the type qwen2_vl"):
        read_plan("opskip:qwen2.5-vl-7b/8").validate(QWEN, "qwen2_vl")


SAVED = {
    "llava-1.5-7b": (LLAVA, 576, (18.9, 22.3, 24.4, 25.2, 28.6, 30.7, 34.1)),
    "llava-v1.6-vicuna-7b": (LLAVA, 2880, (20.8, 23.9, 28.1, 31.2, 34.3, 40.6, 45.8)),
    "qwen2.5-vl-7b": (QWEN, 1296, (24.0, 28.3, 35.0, 37.0, 41.3, 48.0)),
    "qwen3-vl-8b": (QWEN3, 1024, (30.1, 32.3, 34.5, 40.9, 44.5, 48.1, 50.3)),
}
"""Visual tokens, and the share of a prefill's multiply-adds that each preset saves, in percent, with 64 text tokens."""


@pytest.mark.parametrize("model", SAVED)
def test_the_share_that_presets_of_op_skip_save(model) -> None:
    sizes, visual, expected = SAVED[model]
    for preset, share in zip(OP_SKIP[model], expected, strict=True):
        read = read_plan(f"opskip:{model}/{preset}")
        cost = prefill_summary(sizes.layer_sizes, sizes.num_layers, 64, visual, read.plan, read.reduction, None)
        assert 100 * (1 - cost["without_probes"]["share_of_dense"]) == pytest.approx(share, abs=0.1)


def test_the_cost_that_shortv_prints() -> None:
    """8.5 and 4.7 TFLOPs, two per multiply-add."""
    read = read_plan("shortv:llava-1.5-7b")
    cost = prefill_summary(LLAVA.layer_sizes, 32, 64, 576, read.plan, read.reduction, None)
    assert 2e-12 * cost["dense"] == pytest.approx(8.504, abs=1e-3)
    assert 2e-12 * cost["without_probes"]["reduced"] == pytest.approx(4.694, abs=1e-3)


def plan_of(*arguments: str) -> PlanFile:
    parser = ArgumentParser("test", "")
    add_plan_options(parser)
    return read_plan_options(parser, parser.parse_args(arguments))


def test_the_option_that_holds_the_text_before(tmp_path, capsys) -> None:
    policy = "--plan=opskip:llava-1.5-7b/8"
    assert not plan_of(policy).plan.freeze_text_before
    assert "--freeze-text-before repeats that" in capsys.readouterr().err
    held = plan_of(policy, "--freeze-text-before")
    assert held.plan == replace(read_plan("opskip:llava-1.5-7b/8").plan, freeze_text_before=True)
    assert held.label() == "frozen 24-31 with the text before"
    assert capsys.readouterr().err == ""
    plan_of("--plan=shortv:llava-1.5-7b")
    assert capsys.readouterr().err == "", "their own runs do not"
    document = held.document()
    assert (document["format"], document["freeze_text_before"]) == ("rlens-plan/2", True)
    assert read_plan(written(tmp_path, document)).plan == held.plan
    with pytest.raises(UserError, match="freeze_text_before must be true or false, not 1"):
        read_plan(written(tmp_path, document | {"freeze_text_before": 1}))
    with pytest.raises(UserError, match="is about frozen layers, and the plan freezes none"):
        plan_of(f"--plan={written(tmp_path, {'format': 'rlens-plan/1', 'ffn': [3]})}", "--freeze-text-before")
    with pytest.raises(UserError, match="--freeze-text-before needs a --plan that freezes layers"):
        plan_of("--freeze-text-before")
