"""How the methods of a comparison are read, and its table from scores, tokens and times that are known."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from rlens_jax.engine.peak_memory import PeakMemory
from rlens_jax.engine.session import ModelFolder
from rlens_jax.errors import UserError
from rlens_jax.evaluation import method_table
from rlens_jax.evaluation.evaluation import Times, VariantTime
from rlens_jax.evaluation.measured import Measured
from rlens_jax.evaluation.method_table import Answered, Table, check_relative
from rlens_jax.evaluation.methods import Method, read_methods
from rlens_jax.evaluation.profiles import Entry, Manner
from rlens_jax.families.generation_config import Decoding
from rlens_jax.flops import prefill_cost, selection_cost
from rlens_jax.metrics.score import Score, mean_ratio
from rlens_jax.plan_file import FORMAT, PlanFile, read_plan
from rlens_jax.plans import SKIP, Plan, Reduction
from rlens_jax.pruning import METHODS, VTW, FastV, Folder
from rlens_jax.reporting.comparison_report import comparison_latex, comparison_summary, verdicts, write_comparison

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
PAGE = (128, 64)
SCHEMA = json.loads((Path(method_table.__file__).parent / "comparison.schema.json").read_text())


@pytest.fixture(scope="module")
def embedded() -> ModelFolder:
    return ModelFolder.find("embedded")


@pytest.fixture
def plan_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b.json").write_text(json.dumps({"format": FORMAT, "ffn": [11]}))
    (tmp_path / "pruned.json").write_text(json.dumps({"format": FORMAT, "pruning": {"method": "vtw", "layer": 3}}))
    return tmp_path / "a+b.json"


def read(model: ModelFolder, *texts: str, budgets: Sequence[str] = ("0.75", "0.5", "0.25")) -> list[Method]:
    return read_methods(texts, budgets, model, [(model.kind.measure(model.path, {}), [PAGE])])


def test_methods_of_every_form(embedded: ModelFolder, plan_path: Path) -> None:
    texts = ("a+b.json", "fastv@0.4", "vtw@8", "vtw@.5", "folder@0.9", "downsample@0.7", "a+b.json+fastv@0.4", "embedded-plan")
    dense, plan, fastv, vtw, half, folder, smaller, both, own = read(embedded, *texts)
    assert (dense.name, dense.plan, dense.image_share) == ("dense", PlanFile(), None)
    assert [method.name for method in (plan, fastv, vtw, half, folder, smaller, both, own)] == list(texts)
    assert plan.plan == read_plan(plan_path)
    assert fastv.plan.pruning == FastV(2, 0.6)  # 0.4 are kept, 0.6 dropped
    assert (vtw.plan.pruning, half.plan.pruning, folder.plan.pruning) == (VTW(8), VTW(6), Folder(0.1))
    assert (smaller.plan, smaller.image_share) == (PlanFile(), 0.7)
    assert (both.plan.plan, both.plan.pruning) == (plan.plan.plan, FastV(2, 0.6))
    assert own.plan.plan.frozen == (11,)
    assert len({method.key for method in (dense, plan, fastv, vtw, half, folder, smaller, both, own)}) == 9


def test_every_way_to_prune_takes_a_budget(embedded: ModelFolder) -> None:
    """Whatever is added to the plan files can be compared, and less is kept for less."""
    methods = read(embedded, "all")
    families = dict.fromkeys(method.name.partition("@")[0] for method in methods[1:])
    assert {*families} <= {"downsample", *METHODS} and {"downsample", "fastv", "vtw", "folder"} <= {*families}
    for family in families:
        mine = [method for method in methods if method.name.partition("@")[0] == family]
        assert len(mine) == (2 if family == "downsample" else 3), family
        if family != "downsample":
            means = [sum(method_table.visual_in_layer(method.plan.pruning, 128, 12)) for method in mine]
            assert means == sorted(set(means), reverse=True) and means[0] < 12 * 128, family


def test_budgets_expand_methods(embedded: ModelFolder, plan_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = read(embedded, "folder", "a+b.json+vtw", "downsample", budgets=("0.6", "0.3"))
    names = ["folder@0.6", "folder@0.3", "a+b.json+vtw@0.6", "a+b.json+vtw@0.3", "downsample@0.6", "downsample@0.5156"]
    assert [method.name for method in methods[1:]] == names
    # A page has 128 tokens, and at least 66.
    assert "downsample@0.3: images of this model have at least 0.5156 of their visual tokens; that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        (["fastvv@0.5"], "'fastvv@0.5' is no plan file, no published policy, and none of downsample, fastv,"),
        (["fastvv@0.5"], r"\(did you mean 'fastv'\?\)"),
        (["none.json"], "'none.json' is no plan file"),
        (["fastv@1.5"], "fastv@1.5: a budget is the share of the visual tokens that is kept, above 0 and below 1, not '1.5'"),
        (["fastv@0"], "above 0 and below 1, not '0'"),
        (["folder@"], "above 0 and below 1, not ''"),
        (["downsample@1"], "above 0 and below 1, not '1'"),
        (["downsample@0.2"], "downsample@0.2: images of this model have at least 0.5156 of their visual tokens; choose that or"),
        (["vtw@12"], "vtw@12: VTW prunes after layer 12, but the model has 12 layers; choose 1 to 11"),
        (["vtw@0"], "vtw@0: VTW: layer must be a whole number, at least 1"),
        (["fastv@0.5", "vtw@8", "fastv@.50"], "fastv@.50 is the same method as fastv@0.5; name each method once"),
        (["fastv", "fastv@0.25"], "fastv@0.25 is the same method as fastv@0.25"),
        (["dense"], "dense is the same method as dense"),
        (["a+b.json", "./a+b.json"], "./a\\+b.json is the same method as a\\+b.json"),
        (["pruned.json+folder@0.5"], "pruned.json\\+folder@0.5: the plan prunes already: VTW after layer 3"),
        (["opskip:llava-1.5-7b/12"], "the policy is for .*, which has 32 layers, but this model has 12"),
        (["shortv:llava"], "shortv has no policy for 'llava'"),
    ],
)
def test_bad_methods(embedded: ModelFolder, plan_path: Path, texts: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read(embedded, *texts)


def test_bad_budgets(embedded: ModelFolder) -> None:
    with pytest.raises(UserError, match="above 0 and below 1, not '75%'"):
        read(embedded, "vtw@8", budgets=("75%",))


def test_images_of_fixed_size_are_not_down_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelFolder.find(MODELS / "llava_1_5_7b_hf")
    for text in ("downsample", "downsample@0.5"):
        with pytest.raises(UserError, match="all images of this model have as many visual tokens, whatever their size"):
            read(model, text)
    assert not any(method.image_share for method in read(model, "all"))
    assert "left out: downsample: all images of this model" in capsys.readouterr().err


QUESTIONS, TEXT, VISUAL = 40, 20, 100
DENSE = PlanFile()
COMPARED = (
    Method("dense"),
    Method("plan_{}%.json", PlanFile(Plan(ffn=(0, 1, 2), attention_levels=((3, SKIP),)), Reduction(active_fraction=0.5))),
    Method("downsample@0.5", DENSE, 0.5),
    Method("vtw@6", PlanFile(pruning=VTW(6))),
)
RIGHT = {"read": (40, 20, 30, 40), "compare": (20, 20, 15, 10)}
"""Of 40 answers of each method."""
ASKED = {"read": Manner(Decoding(4)), "compare": Manner(Decoding(4, 1.2, 50), Entry(not_reproduced=("3 beams",)))}
SECONDS = (1.0, 0.75, 0.5, 0.25)


def score(name: str, right: int) -> Score:
    groups, outcomes = tuple(map(str, range(QUESTIONS))), [float(place < right) for place in range(QUESTIONS)]
    ratio = mean_ratio(100, groups, outcomes)
    return Score((ratio,), {}, groups, ("",) * QUESTIONS, name, ratio.value, "%", tuple(outcomes), "rules")


def rows_of(
    embedded: ModelFolder, compared: Sequence[Method], right: Mapping[str, Sequence[int]], seconds: Sequence[float]
) -> list[dict]:
    """The rows of a table, from how many answers of each method are right, and its times."""

    def prompts(place: int) -> Counter[tuple[int, int]]:
        visual = round(VISUAL * (compared[place].image_share or 1))
        return Counter({(TEXT, visual): 30, (TEXT + 4, visual): 10})

    def measured(place: int) -> Measured:
        own, dense = (VariantTime((2 * each, each, each), (each,) * 3, (each,) * 3) for each in (seconds[place], 1.0))
        times = Times(8, 1, 8, 32, 128, dense, own, 31)
        return Measured(compared[place].key, compared[place].name, times, PeakMemory(10**9, "resident"))

    def answered_by(place: int) -> dict[str, Answered]:
        return {name: Answered(score(name, counts[place]), prompts(place), 0) for name, counts in right.items()}

    places = range(len(compared))
    answered = list(map(answered_by, places))
    images = {name: [place // 4 for place in range(QUESTIONS)] for name in right}
    return Table(compared, answered, [*map(measured, places)], images, embedded.kind.config.decoder, None, 4, 200, 0).rows()


@pytest.fixture(scope="module")
def fields(embedded: ModelFolder) -> dict:
    """The fields of a comparison.json, with a table whose numbers are known."""
    tokens = {"mean": 20.0, "least": 20, "most": 24}
    return {
        "schema": "rlens-comparison/1",
        "model": {"path": "my_model", "hash": "h", "model_type": "qwen2_vl", "num_layers": 12, "not_applied": ["sampling"]},
        "device": "cpu",
        "dtype": "float32",
        "kernel": "packed",
        "versions": {"jax": "1"},
        "datasets": {
            name: {"digest": "d", "questions": QUESTIONS, "unusable": 0, "images": 10, "asked": asked.fields()}
            for name, asked in ASKED.items()
        },
        "prompts": {"text_tokens": tokens, "visual_tokens": tokens},
        "timed": {"prompts": 8, "rows": 8, "text_slots": 32, "visual_slots": 128, "new_tokens": 32, "repeats": 3},
        "methods": rows_of(embedded, COMPARED, RIGHT, SECONDS),
        "configuration": {"profile": "kit@1"},
    }


def test_the_rows(fields: dict, embedded: ModelFolder) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(fields, SCHEMA)
    dense, plan, smaller, vtw = fields["methods"]
    decoder = embedded.kind.config.decoder
    # Each dataset's score as a share of dense, then their mean.
    assert [row["score"]["value"] for row in fields["methods"]] == [1.0, 0.75, 0.75, 0.75]
    assert [row["change"]["value"] for row in fields["methods"]] == [0.0, -0.25, -0.25, -0.25]
    assert (dense["change"]["low"], dense["change"]["high"]) == (0, 0)
    assert dense["score"]["low"] < 1 < dense["score"]["high"]
    assert vtw["datasets"]["compare"]["change"]["value"] == -25
    assert [vtw["visual_tokens"][name] for name in ("first", "kept", "mean")] == [100, 0, 50]
    assert [smaller["visual_tokens"][name] for name in ("first", "kept", "mean")] == [50, 50, 50]
    # Text is 20 or 24 tokens long, 21 in the mean; a token has a key and a value in every layer that it enters.
    assert dense["text_tokens"] == 21
    token = 2 * 4 * decoder.layer_sizes.kv_width
    assert [row["kv_bytes"] for row in fields["methods"]] == [token * 12 * (21 + mean) for mean in (100, 100, 50, 50)]
    for row, method, visual in zip(fields["methods"], COMPARED, (100, 100, 50, 100), strict=True):
        layers = method_table.visual_in_layer(method.plan.pruning, visual, 12)
        costs = {
            probes: [
                prefill_cost(decoder.layer_sizes, text, layers, method.plan.plan, method.plan.reduction, with_probes=probes)
                for text in (20, 24)
            ]
            for probes in (False, True)
        }
        adds = row["multiply_adds"]
        assert adds["decoder"] == pytest.approx(0.75 * costs[False][0] + 0.25 * costs[False][1])
        assert adds["decoder"] + adds["probes"] == pytest.approx(0.75 * costs[True][0] + 0.25 * costs[True][1])
        assert adds["selection"] == selection_cost(decoder.layer_sizes, 12, 20, visual, method.plan.pruning)
        assert row["costs"]["multiply_adds"] == pytest.approx(sum(adds.values()) / dense["multiply_adds"]["decoder"])
    # Three of twelve layers compute half an FFN, one no attention.
    assert plan["updates"] == {"attention": pytest.approx(11 / 12), "ffn": pytest.approx(1 - 1.5 / 12)}
    assert vtw["updates"] == {"attention": 0.5, "ffn": 0.5}
    assert [row["costs"]["prefill"] for row in fields["methods"]] == [1.0, 0.75, 0.5, 0.25]
    assert plan["times"]["prefill"]["range"] == [0.75, 1.5]
    assert vtw["tokens_per_second"] == 8 * 31 / 0.25


def test_what_dominates_and_what_loses(fields: dict) -> None:
    dense, plan, smaller, vtw = fields["methods"]
    # Equal scores of other questions: no one is surely as good as the other, but each as itself.
    assert dense["dominated_by"]["prefill"] == []
    beside = plan["beside_down_sampled"]
    assert beside["prefill"]["name"] == "downsample@0.5" and beside["prefill"]["score_above"]["value"] == 0
    assert vtw["beside_down_sampled"]["prefill"] is None and vtw["beside_down_sampled"]["kv_bytes"] is not None
    assert set(smaller["beside_down_sampled"].values()) == {None}
    assert verdicts(fields) == ["No down-sampled images that cost as little score higher than plan_{}%.json, vtw@6."]
    worse = {**fields, "methods": json.loads(json.dumps(fields["methods"]))}
    for cost, above in (("prefill", (0.2, 0.1, 0.3)), ("kv_bytes", (0.2, 0.1, 0.3))):
        found = dict(zip(("value", "low", "high"), above, strict=True))
        worse["methods"][1]["beside_down_sampled"][cost]["score_above"] = found
    worse["methods"][3]["beside_down_sampled"]["kv_bytes"]["score_above"] = {"value": 0.05, "low": -0.1, "high": 0.2}
    assert verdicts(worse) == [
        "plan_{}%.json loses to downsample@0.5, whose score is +20.0 (+10.0 to +30.0) points above, for no more prefill time and "
        "KV cache.",
        "vtw@6 may lose to downsample@0.5, whose score is +5.0 (-10.0 to +20.0) points above, for no more KV cache.",
    ]
    without = {**fields, "methods": [*fields["methods"][:2], fields["methods"][3]]}
    assert verdicts(without)[0].startswith("Down-sampled images are not among the methods")


def test_a_method_stands_beside_the_best_of_the_down_sampled_images_that_cost_no_more(embedded: ModelFolder) -> None:
    compared = [Method("dense"), Method("vtw@6", PlanFile(pruning=VTW(6)))]
    compared += [Method(f"downsample@{share}", DENSE, share) for share in (0.75, 0.5, 0.25)]
    rows = rows_of(embedded, compared, {"read": (40, 20, 40, 32, 24)}, (1.0, 0.6, 0.75, 0.5, 0.25))
    beside = rows[1]["beside_down_sampled"]["prefill"]
    assert beside["name"] == "downsample@0.5"
    assert beside["score_above"]["value"] == pytest.approx(0.3)


def test_the_files(fields: dict, tmp_path: Path) -> None:
    write_comparison(fields, tmp_path)
    names = ["comparison.csv", "comparison.json", "comparison.png", "comparison.svg", "comparison.tex", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "comparison.json").read_text()) == fields
    rows = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert [row["name"] for row in rows] == [method.name for method in COMPARED]
    assert float(rows[3]["visual_tokens.mean"]) == 50 and float(rows[2]["datasets.read.value"]) == 75
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "compare is not asked as in kit@1: 3 beams." in page
    assert "plan_{}%.json" in page and len(page) < 3_000_000
    svg = (tmp_path / "comparison.svg").read_text()
    assert svg.startswith("<?xml") and "measured prefill time" in svg


def test_the_table_for_a_paper_is_escaped(fields: dict) -> None:
    lines = comparison_latex(fields).splitlines()
    assert lines[2] == r"\toprule" and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    cells = [line.removesuffix(r" \\").split(" & ") for line in (lines[3], *lines[5:-2])]
    assert {len(row) for row in cells} == {len(lines[1].rpartition("{")[2].removesuffix("}"))}
    assert cells[2][0] == r"plan\_\{\}\%.json"
    assert cells[0][1] == r"score, \% of dense"
    assert not re.search(r"(?<!\\)[%#&_$]", "".join(cell for row in cells for cell in row))


def test_the_text_for_the_terminal(fields: dict) -> None:
    lines = comparison_summary(fields, Path("runs/x")).splitlines()
    assert lines[0].split()[0] == "method"
    assert [line.split()[0] for line in lines[1:5]] == [method.name for method in COMPARED]
    assert lines[-1] == "Report: runs/x/report.html; numbers: runs/x/comparison.json"
    assert lines[-4:-2] == [
        "Answers are greedy, without what the checkpoint asks for: sampling.",
        "compare is not asked as in kit@1: 3 beams.",
    ]


def test_a_dense_model_that_is_never_right_has_no_shares() -> None:
    with pytest.raises(UserError, match="read: the dense model's score is 0, so no share of it is left"):
        check_relative({"read": score("read", 0)})


def test_draws_of_datasets_with_common_images_go_together() -> None:
    """The mean over two datasets with the same questions about the same images varies as much as one of them."""
    one = score("read", 25)
    images = [list(range(QUESTIONS))] * 2
    drawn = method_table.Draws([one, one], images, samples=100, seed=0)
    assert drawn.scores(0, one) == pytest.approx(drawn.scores(1, one))
    apart = method_table.Draws([one, one], [None, None], samples=100, seed=0)
    assert not np.allclose(apart.scores(0, one), apart.scores(1, one))
