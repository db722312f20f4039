"""Plans written by hand and taken from rankings; every error is one clear line."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlens_jax.errors import UserError
from rlens_jax.flops import PUBLISHED_DECODERS, DecoderSizes
from rlens_jax.plan_file import FORMAT, LEVELS_FORMAT, PlanFile, parse_first, read_plan
from rlens_jax.plans import FULL, OPERATORS, SKIP, Operator, Plan, Reduction
from rlens_jax.pruning import FastV
from rlens_jax.search.ranking_file import ranking_fields
from tests.reporting.synthetic import synthetic_results


def written(folder: Path, value: object) -> Path:
    path = folder / "plan.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def levels(**fields: object) -> dict[str, Any]:
    """A plan file with levels."""
    return {"format": LEVELS_FORMAT, **fields}


def ranking(operators: Sequence[Operator] = OPERATORS, **changed: object) -> dict[str, Any]:
    """A ranking.json of a model with 4 layers."""
    fields = ranking_fields(synthetic_results(num_layers=4, samples=20, operators=tuple(operators)))
    orders = {"attention": [3, 1, 0, 2], "ffn": [2, 3, 1, 0]}
    fields["rankings"] = {operator: orders[operator] for operator in operators}
    fields["configuration"]["reduction"] |= {"attention_range": 64, "active_fraction": 0.3}
    return {**fields, **changed}


def test_every_field_arrives(tmp_path: Path) -> None:
    fields = {
        "format": FORMAT,
        "num_layers": 12,
        "attention": [11, 3],
        "ffn": [4],
        "attention_range": 32,
        "active_fraction": 0.25,
        "probe_fraction": "0.05",
        "probe": "random",
        "window": "position",
        "pruning": {"method": "fastv", "layer": 3, "share": 0.3},
    }
    reduction = Reduction(32, 0.25, 0.05, "random", "position")
    expected = PlanFile(Plan((3, 11), (4,)), reduction, 12, FastV(3, 0.3))
    read = read_plan(written(tmp_path, fields))
    assert read == expected
    assert read.label() == "attention 3+11, ffn 4, FastV after layer 3 drops 30 %"
    # What is recorded of a plan is a plan file again, but for the number of layers.
    again = {"format": FORMAT, "num_layers": 12, **read.fields()}
    assert read_plan(written(tmp_path, again)) == expected
    for pruning in (
        {"method": "fastv", "layer": 2, "keep": 192, "attention": "all_tokens", "positions": "renumbered"},
        {"method": "vtw", "layer": 5, "positions": "kept"},
        {"method": "folder", "share": 0.25},
        {"method": "pyramiddrop", "layers": [3, 6], "keep": [0.5, 0.25], "positions": "kept"},
        {"method": "sparsevlm", "keep": [300, 200, 110], "version": "1.5", "positions": "kept"},
        {"method": "dart", "keep": 0.3, "layer": 2, "pivots_visual": 4, "pivots_text": 3, "positions": "kept"},
        {"method": "random", "keep": 64, "positions": "kept"},
        {"method": "strided", "keep": 1, "positions": "kept"},
        {"method": "pooling", "keep": 64, "positions": "kept", "side": 16},
        {"method": "divprune", "keep": 0.098, "positions": "kept"},
        {"method": "cdpruner-embeddings", "keep": 1.0, "positions": "kept"},
        {"method": "fastervlm", "keep": 64, "positions": "kept"},
        {"method": "visionzip", "keep": 64, "positions": "renumbered", "merge": "mean"},
        None,
    ):
        plan = read_plan(written(tmp_path, {**again, "pruning": pruning}))
        assert plan.fields()["pruning"] == pruning


def test_levels_arrive_and_are_written_again(tmp_path: Path) -> None:
    fields = {
        "format": LEVELS_FORMAT,
        "num_layers": 28,
        "attention": [3],
        "attention_levels": [{"layers": [20, 21], "range": 64}, {"layers": [22], "range": 0}, {"layers": [23], "skip": True}],
        "ffn_levels": [{"layers": [20], "fraction": 0.5}, {"layers": [23, 24], "skip": True}],
        "freeze": [25, 26, 27],
    }
    read = read_plan(written(tmp_path, fields))
    assert read.plan.settings(28)[20:] == [(64, 0.5), (64, FULL), (0, FULL), (SKIP, SKIP), (FULL, SKIP), *[(SKIP, SKIP)] * 3]
    document = read.document()
    assert document["format"] == LEVELS_FORMAT
    assert document["freeze"] == [23, 25, 26, 27]
    assert read_plan(written(tmp_path, document)) == read
    assert PlanFile(Plan((3,)), num_layers=28).document()["format"] == FORMAT
    assert read_plan(written(tmp_path, {"format": LEVELS_FORMAT, "ffn": [1]})).document()["format"] == FORMAT


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    assert read_plan(written(tmp_path, {"format": FORMAT})) == PlanFile() == PlanFile(Plan(), Reduction(), None)
    assert read_plan(written(tmp_path, {"format": FORMAT, "ffn": [2]})).plan == Plan(ffn=(2,))


def test_a_ranking_and_its_first_layers(tmp_path: Path) -> None:
    path = written(tmp_path, ranking())
    expected = PlanFile(Plan((1, 3), (2,)), Reduction(64, 0.3), 4)
    assert read_plan(path, {"attention": 2, "ffn": 1}) == expected
    assert read_plan(path, {"ffn": 4}).plan == Plan(ffn=(0, 1, 2, 3))


def test_what_was_reduced_during_the_search_is_part_of_the_plan(tmp_path: Path) -> None:
    only = ranking(operators=["ffn"])
    only["search"]["ffn"]["base"] = {"attention": [0], "ffn": []}
    path = written(tmp_path, only)
    assert read_plan(path, {"ffn": 2}).plan == Plan((0,), (2, 3))
    with pytest.raises(UserError, match="no first layers of attention"):
        read_plan(path, {"attention": 2})


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"format": FORMAT, "atention": [1]}, "unknown field 'atention' \\(did you mean 'attention'\\?\\)"),
        ({"attention": [1]}, "field 'format' must be"),
        ({"format": "rlens-plan/3"}, "must be 'rlens-plan/1' or 'rlens-plan/2', not 'rlens-plan/3'"),
        ({"format": FORMAT, "freeze": [1]}, "field 'freeze' needs the format 'rlens-plan/2'"),
        (levels(freeze="1"), "freeze must be a list of layers"),
        (levels(freeze=[1, 1]), "plan.freeze names layer 1 twice"),
        (levels(freeze=[1], ffn=[1]), "plan.freeze names layer 1, which plan.ffn names already"),
        (levels(attention_levels={"layers": [1]}), "attention_levels must be a list of levels, such as .{.layers.: .20., .skip"),
        (levels(attention_levels=[3]), r"plan.attention_levels.0. must be an object such as"),
        (levels(attention_levels=[{"skip": True}]), r"plan.attention_levels.0..layers is missing"),
        (levels(attention_levels=[{"layers": [1]}]), 'plan.attention_levels.0. must have either "range" or "skip"'),
        (levels(ffn_levels=[{"layers": [1], "fraction": 0.5, "skip": True}]), 'ffn_levels.0. must have either "fraction" or'),
        (levels(ffn_levels=[{"layers": [1], "skip": False}]), r"ffn_levels.0..skip must be true, or left out, not False"),
        (levels(ffn_levels=[{"layers": [1], "range": 3}]), r"unknown field plan.ffn_levels.0..range"),
        (levels(attention_levels=[{"layers": [1], "rnage": 3}]), "attention_levels.0..rnage .did you mean 'range'"),
        (levels(attention_levels=[{"layers": [1], "range": "0"}]), "range must be a whole number from 0"),
        (levels(ffn_levels=[{"layers": [1], "fraction": 1}]), "fraction must be above 0 and below 1, not 1"),
        (
            levels(ffn_levels=[{"layers": [1, 2], "fraction": 0.5}, {"layers": [2], "skip": True}]),
            r"plan.ffn_levels.1. names layer 2, which plan.ffn_levels.0. names already",
        ),
        (
            levels(freeze=[7], attention_levels=[{"layers": [7], "range": 2}]),
            r"plan.attention_levels.0. names layer 7, which plan.freeze names already",
        ),
        ({"format": FORMAT, "attention": "1,2"}, "attention must be a list of layers"),
        ({"format": FORMAT, "ffn": [1, 1]}, "plan.ffn names layer 1 twice"),
        ({"format": FORMAT, "ffn": [0.5]}, "plan.ffn: a layer must be a whole number"),
        ({"format": FORMAT, "num_layers": True}, "num_layers must be a whole number"),
        ({"format": FORMAT, "num_layers": 4, "ffn": [4]}, "ffn in layer 4, but the model has 4 layers"),
        ({"format": FORMAT, "active_fraction": 1.5}, "active_fraction must be a decimal number"),
        ({"format": FORMAT, "window": "ordnal"}, "did you mean 'ordinal'"),
        ({"format": FORMAT, "pruning": "fastv"}, "pruning must be null or an object with a method"),
        ({"format": FORMAT, "pruning": {"method": "fastvv"}}, "did you mean 'fastv'"),
        ({"format": FORMAT, "pruning": {"method": "vtw", "layr": 2}}, "pruning.layr .did you mean 'layer'"),
        ({"format": FORMAT, "pruning": {"method": "vtw"}}, "pruning.layer is missing"),
        ({"format": FORMAT, "pruning": {"method": "fastv", "share": 1.0}}, "share must be a decimal number"),
        (
            {"format": FORMAT, "pruning": {"method": "strided"}},
            "pruning.keep is missing: strided needs a number of visual tokens",
        ),
        ({"format": FORMAT, "pruning": {"method": "strided", "kept": 2}}, "pruning.kept .did you mean 'keep'"),
        ({"format": FORMAT, "pruning": {"method": "divprune", "keep": 0}}, "DivPrune: keep must be at least 1 token"),
        ({"format": FORMAT, "pruning": {"method": "cdpruner", "keep": 9}}, "pruning.method cdpruner needs CLIP's text tower"),
        ('{"format": "rlens-plan/1", "ffn": [1], "ffn": [2]}', "field 'ffn' is given twice"),
        ('{"format": "rlens-plan/1",', "not valid JSON"),
        (7, "must hold one JSON object"),
        (ranking(), "choose how many of its first layers to reduce, as in --first attention=K,ffn=K"),
        ({"schema": "rlens-ranking/1"}, "'rankings' is a required property"),
    ],
)
def test_bad_files(tmp_path: Path, value: object, complaint: str) -> None:
    path = written(tmp_path, value)
    with pytest.raises(UserError, match=complaint) as raised:
        read_plan(path)
    assert str(raised.value).startswith(str(path))


def test_bad_choices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file"):
        read_plan(tmp_path / "none.json")
    path = written(tmp_path, ranking())
    with pytest.raises(UserError, match="ranks 4 layers of ffn; 5 cannot be reduced"):
        read_plan(path, {"ffn": 5})
    with pytest.raises(UserError, match="can be chosen from a ranking"):
        read_plan(written(tmp_path, {"format": FORMAT}), {"ffn": 1})


def sizes(num_layers: int) -> DecoderSizes:
    return replace(PUBLISHED_DECODERS["qwen2-vl-2b"], num_layers=num_layers)


def test_a_plan_for_another_number_of_layers() -> None:
    PlanFile(Plan((3,)), num_layers=4).validate(sizes(4))
    PlanFile(Plan((3,))).validate(sizes(28))
    with pytest.raises(UserError, match="for a model with 4 layers, but this model has 28"):
        PlanFile(Plan((3,)), num_layers=4).validate(sizes(28))
    with pytest.raises(UserError, match="attention in layer 3, but the model has 3 layers"):
        PlanFile(Plan((3,))).validate(sizes(3))
    with pytest.raises(UserError, match="prunes after layer 4, but the model has 4 layers"):
        PlanFile(pruning=FastV(4)).validate(sizes(4))


def test_first_layers_as_text() -> None:
    assert parse_first("attention=11,ffn=5") == {"attention": 11, "ffn": 5}
    assert parse_first(" ffn = 0 ") == {"ffn": 0}
    for text in ("11", "attention", "attention=-1", "ffn=1,ffn=2", "", "ffn=x"):
        with pytest.raises(UserError, match="first layers"):
            parse_first(text)
    with pytest.raises(UserError, match="did you mean 'attention'"):
        parse_first("atention=3")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"active_fraction": "1e-99999999"}, "active_fraction has more digits than a float keeps"),
        ({"pruning": {"method": "fastv", "share": "1e-99999999"}}, "share has more digits than a float keeps"),
        ({"active_fraction": "0." + "1" * 3_000_000}, "active_fraction has more digits than a float keeps"),
        ({"active_fraction": "1e-99999999999999999999"}, "active_fraction must be a decimal number"),
        ({"ffn": [*range(100_000)]}, "no model has a layer 1000"),
        ({"ffn": [0] * 100_000}, "names layer 0 twice"),
        ({"num_layers": 10**9}, "num_layers must be a whole number from 1 to 1000"),
        ({"attention_range": 2**31}, "attention_range must be a whole number from 1 to 2147483647"),
        ({"probe": "x" * 100_000}, "probe must be one of"),
        ({"pruning": ["x"] * 100_000}, "pruning must be null or an object"),
        ({"pruning": {"method": "vtw", "layer": "9" * 100_000}}, "layer must be a whole number"),
    ],
)
def test_absurd_values_are_refused_at_once_in_a_short_line(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": "rlens-plan/1", **fields}))
    with pytest.raises(UserError, match=complaint) as caught:
        read_plan(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_first_layers_of_an_absurd_number() -> None:
    with pytest.raises(UserError, match="must have the form"):
        parse_first("ffn=" + "9" * 5000)
