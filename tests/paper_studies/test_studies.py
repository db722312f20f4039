"""Every study on the toy model: what it measures, what it writes, and that nothing is measured twice."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import jax
import jsonschema
import numpy as np
import pytest
from flax import nnx

from rlens_jax.engine.programs import Programs
from rlens_jax.flops import saving, visual_in_layer
from rlens_jax.models.pruned import run_prompt
from rlens_jax.paper_studies import reduction_studies
from rlens_jax.paper_studies.studies_run import STUDIES, plot_study, write_study
from rlens_jax.paper_studies.study import STUDY_NAMES, Facts, study_json, summary
from rlens_jax.paper_studies.study_bench import Bench
from rlens_jax.plans import OPERATORS, Plan
from rlens_jax.pruning import VTW, FastV
from rlens_jax.search.objective import dataset_metric
from tests.engine.toy import CONFIG, LAYERS, REDUCTION, toy_programs
from tests.paper_studies.toy_bench import ToyRun

pytestmark = pytest.mark.slow

SCHEMA = json.loads(files("rlens_jax.paper_studies").joinpath("study.schema.json").read_text())

ALL_PARTS = reduction_studies.RANGE_PARTS
FEW = {
    (reduction_studies, "FRACTIONS"): (0.5,),
    (reduction_studies, "RANGE_PARTS"): (1,),
    (reduction_studies, "PROBE_FRACTIONS"): (1.0,),
    (reduction_studies, "SHARES"): (0.5,),
    (reduction_studies, "VTW_QUARTERS"): (2,),
}
"""Every value is compiled."""


class Finished:
    """All studies of one folder."""

    def __init__(self, folder: Path):
        self.folder, self.toy = folder, ToyRun()
        with self.toy.bench(folder) as bench:
            self.studies = {name: STUDIES[name](bench) for name in STUDY_NAMES}
            self.facts = facts_of(bench)


def facts_of(bench: Bench) -> Facts:
    measured = bench.measure("dense", [])
    return Facts(
        model="toy",
        model_hash="m",
        num_layers=LAYERS,
        data_hash="d",
        samples=bench.samples,
        dense=bench.dense(measured),
        configuration={},
        versions={"jax": "1"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), values in FEW.items():
            patch.setattr(module, name, values)
        yield Finished(tmp_path_factory.mktemp("studies"))


def test_there_is_a_study_for_every_name() -> None:
    assert set(STUDIES) == set(STUDY_NAMES)
    assert set(SCHEMA["properties"]["study"]["enum"]) == set(STUDY_NAMES)


@pytest.mark.parametrize("name", STUDY_NAMES)
def test_what_is_said_of_a_study(finished: Finished, name: str) -> None:
    study = finished.studies[name]
    found = json.loads(study_json(study, finished.facts))
    jsonschema.validate(found, SCHEMA)
    assert found["study"] == name
    svg = plot_study(study, finished.facts, "svg").decode()
    printed = summary([study], Path("runs"))
    assert f"runs/{name}.json" in printed
    for panel in study.panels:
        assert panel.title in svg
        for series in panel.series:
            assert series.name in svg
            assert study.findings or series.name in printed
    for finding in study.findings:
        assert finding.statement in printed


def test_shares_are_printed_in_percent(finished: Finished) -> None:
    study = finished.studies["fraction"]
    first, *_ = study.panels[0].series
    assert [point.x for point in first.points] == [0.1, 0.5]
    means = [100 * point.mean for point in first.points]
    assert f"2 of 5 layers: 10: {means[0]:.1f}  50: {means[1]:.1f}\n" in summary([study], Path("runs"))


def test_the_files(finished: Finished, tmp_path: Path) -> None:
    study = finished.studies["layers"]
    write_study(study, finished.facts, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.json", "layers.png", "layers.svg"]
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "layers.svg").read_bytes() == plot_study(study, finished.facts, "svg")
    assert (tmp_path / "layers.json").read_text() == study_json(study, finished.facts)


def test_the_schema_knows_every_field(finished: Finished) -> None:
    found = json.loads(study_json(finished.studies["layers"], finished.facts))
    panel = found["panels"][0]
    point = panel["series"][0]["points"][0]
    for place in (found, panel, point, point["case"], point["flops"], found["findings"][0]):
        place["unknown"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(found, SCHEMA)
        del place["unknown"]
        name, value = place.popitem()
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(found, SCHEMA)
        place[name] = value
    jsonschema.validate(found, SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_points_are_what_the_model_does(finished: Finished) -> None:
    """Each point's metrics, from all layers at once without a journal, a base or another plan before it."""
    toy, checked = finished.toy, 0
    split = toy.splits["test"]
    for name in ("layers", "text", "fraction"):
        for panel in finished.studies[name].panels:
            point = panel.series[-1].points[1 + LAYERS // 2 if name != "fraction" else 0]
            assert point.case is not None
            outcomes = np.zeros(len(split.samples))
            programs = toy.programs(point.case.variant)
            for batch in split.batches:
                states = programs.embed(batch.inputs.text_ids, batch.visual)
                states = programs.layers(states, batch.inputs, point.case.plan, 0, LAYERS)
                numbers, right, *_ = map(np.asarray, programs.outcome(states, batch.inputs))
                outcomes[numbers[numbers >= 0]] = right[numbers >= 0]
            for dataset, members in split.datasets.items():
                assert point.metrics[dataset] == dataset_metric(outcomes[members].tolist())
            assert point.mean == pytest.approx(np.mean(list(point.metrics.values())))
            assert point.loss == pytest.approx(1 - point.mean)  # the dense model gets all of them right
            checked += 1
    assert checked == 7


def test_reductions_change_outcomes(finished: Finished) -> None:
    """Or the comparisons above and below would hold for studies of nothing."""
    for name in ("layers", "text"):
        lost = [p.loss for panel in finished.studies[name].panels for p in panel.series[-1].points]
        assert max(lost) > 0.1, name


def test_the_last_layer_is_free_and_shown_apart(finished: Finished) -> None:
    for panel in finished.studies["layers"].panels:
        (series,) = panel.series
        assert panel.free == (0.0, 1.0)  # L_p = 3: the last layer comes first
        before, after, further = series.points[:3]
        assert before.metrics == after.metrics
        assert after.flops is not None
        assert after.flops.saved == after.flops.last_layer > 0
        assert further.flops is not None
        assert further.flops.saved > further.flops.last_layer == after.flops.last_layer
    curves = finished.studies["layers"].panels
    assert [len(curve.series[0].orders) for curve in curves] == [1, 1, 2]
    both = curves[2].series[0].points[2].case
    assert both is not None
    assert both.plan == Plan(*(curve.series[0].orders[0][:2] for curve in curves[:2]))


def test_text_is_simulated_in_the_same_layers(finished: Finished) -> None:
    study = finished.studies["text"]
    for panel in study.panels:
        visual, text = panel.series
        for one, other in zip(visual.points, text.points, strict=True):
            assert one.case is not None
            assert other.case is not None
            assert one.case.plan == other.case.plan
            assert other.flops is None
        assert {point.case.variant.tokens for point in text.points if point.case} == {"text"}
        assert visual.points[0].metrics == text.points[0].metrics
    found = {finding.name: finding for finding in study.findings}
    half = [point.x for point in study.panels[0].series[0].points].index(LAYERS // 2)
    for panel, which in zip(study.panels, ("attention", "ffn", "both"), strict=True):
        losses = [series.points[half].loss for series in panel.series]
        assert found[f"{which}_visual_loss"].value == pytest.approx(losses[0])
        assert found[f"{which}_text_loss"].value == pytest.approx(losses[1])
        ratio = found[f"{which}_ratio"].value
        if losses[0] > 0:
            assert ratio == pytest.approx(losses[1] / losses[0])
        else:
            assert ratio == ("infinite" if losses[1] > 0 else "undefined")


def test_sweeps_vary_one_value(finished: Finished) -> None:
    longest = int(finished.toy.splits["test"].num_visual.max())
    fields = {"fraction": "active_fraction", "range": "attention_range"}
    for name, field in fields.items():
        (panel,) = finished.studies[name].panels
        assert [series.name for series in panel.series] == ["2 of 5 layers", "5 of 5 layers"]
        for series in panel.series:
            for point in series.points:
                assert point.case is not None
                assert getattr(point.case.variant.reduction, field) == point.x
    (ranges,) = finished.studies["range"].panels
    assert [point.x for point in ranges.series[0].points][-1] == longest
    # A range of all visual tokens is plain causal attention, whatever is counted.
    assert ranges.series[1].points[-1].loss == 0
    (probes,) = finished.studies["probes"].panels
    assert {series.name.split(", ")[1] for series in probes.series} == {"strided", "random"}
    for series in probes.series:
        for point in series.points:
            assert point.case is not None
            reduction = point.case.variant.reduction
            assert reduction.probe == series.name.split(", ")[1]
            assert reduction.probe_count(longest) == point.x
    everything = [series.points[-1] for series in probes.series]
    assert everything[0].metrics == everything[1].metrics  # all tokens are probes, in whatever order


def test_the_ranges_reach_from_a_64th_of_the_visual_tokens_to_all() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction_studies, "RANGE_PARTS", ALL_PARTS)
        assert reduction_studies.range_values(128) == [2, 4, 8, 16, 32, 64, 128]
        assert reduction_studies.range_values(10) == [1, 2, 5, 10]


def test_strategies(finished: Finished) -> None:
    study = finished.studies["strategies"]
    for operator, panel in zip(OPERATORS, study.panels, strict=True):
        orders = {series.name: series.orders for series in panel.series}
        assert orders["by position"] == ((4, 3, 2, 1, 0),)
        for prior in (1, 2, 3):
            (order,) = orders[f"hybrid, L_p = {prior}"]
            assert order[:prior] == tuple(range(LAYERS - 1, LAYERS - 1 - prior, -1))
        assert len(orders["random, mean of 2"]) == 2
        for series in panel.series:
            ends = [series.points[0].metrics, series.points[-1].metrics]
            first = panel.series[0].points
            assert ends == [first[0].metrics, first[-1].metrics]  # no layer, and all: no order matters
        found = {finding.name: finding.value for finding in study.findings}
        searched = found[f"{operator}_area searched"]
        for name in orders:
            if name != "searched":
                own = found[f"{operator}_area {name}"]
                assert found[f"{operator}_margin {name}"] == pytest.approx(searched - own)


def test_search_methods(finished: Finished) -> None:
    study = finished.studies["search_methods"]
    found = {finding.name: finding.value for finding in study.findings}
    for operator, panel in zip(OPERATORS, study.panels, strict=True):
        orders = {series.name: series.orders for series in panel.series}
        names = ["one-shot, by the scores of one round", "one-shot, by KL to the dense model"]
        assert list(orders) == ["greedy search", *names, "by position"]
        (greedy,), (one_shot,), (by_kl,), (position,) = orders.values()
        areas = [found[f"{operator}_area {name}"] for name in orders]
        for key, order, area in (("one_shot", one_shot, areas[1]), ("one_shot_kl", by_kl, areas[2])):
            assert greedy[:3] == order[:3] == position[:3] == (4, 3, 2)
            assert found[f"{operator}_tau {key}"] == (1.0 if greedy == order else -1.0)  # two layers are searched
            assert found[f"{operator}_margin {key}"] == pytest.approx(areas[0] - area)
        # Five layers for the base, 1 + 2 + 3 for the prefixes, 5 + 4 for both candidates, and the last one again.
        assert found[f"{operator}_work one_shot"] == 20
        assert found[f"{operator}_work one_shot_kl"] == 25  # and five for the dense model's distributions
        assert found[f"{operator}_work greedy"] == 20 + (5 - greedy[-1])


def test_pruning_alone_and_on_top_of_a_plan(finished: Finished) -> None:
    study, toy = finished.studies["pruning"], finished.toy
    lines = {series.name: series.points for series in study.panels[0].series}
    both = finished.studies["layers"].panels[2].series[0].points
    assert sorted(point.mean for point in lines.pop("both reductions, first k layers")) == sorted(point.mean for point in both)
    split = toy.splits["test"]
    assert [len(points) for points in lines.values()] == [1, 1, 1, 1]
    for name, (point,) in lines.items():
        assert point.case is not None
        assert point.flops is not None
        assert (point.case.plan == Plan()) is (not name.startswith("both"))
        dropped = point.case.variant.pruning
        assert isinstance(dropped, FastV if "FastV" in name else VTW)
        assert point.x == pytest.approx(1 - point.flops.saved)
        shares = [
            saving(
                CONFIG.decoder.layer_sizes,
                text,
                visual_in_layer(dropped, visual, LAYERS),
                point.case.plan,
                REDUCTION,
                with_probes=True,
            )
            for text, visual in zip(split.num_text.tolist(), split.num_visual.tolist(), strict=True)
        ]
        assert point.flops.with_probes == pytest.approx(np.mean(shares))
        assert 0 < point.flops.last_layer < point.flops.saved


def test_pruned_outcomes_are_those_of_the_model(finished: Finished) -> None:
    toy = finished.toy
    split = toy.splits["test"]
    for series in finished.studies["pruning"].panels[0].series[-2:]:
        (point,) = series.points
        assert point.case is not None
        plan, dropped, right = point.case.plan, point.case.variant.pruning, {}

        @nnx.jit
        def run(decoder, visual, inputs, plan=plan, dropped=dropped):
            """The plan is static, and not data."""
            states = run_prompt(decoder, visual, inputs, plan, REDUCTION, jax.random.key(0), pruning=dropped)
            return decoder.logits(states.x)

        for batch in split.batches:
            logits = np.asarray(run(toy.model.decoder, batch.visual, batch.inputs))
            for row, sample in enumerate(np.asarray(batch.inputs.samples)[:, 0].tolist()):
                slots, targets = (np.asarray(x)[row] for x in (batch.inputs.answer_slots, batch.inputs.answer_targets))
                said = logits[row, slots].argmax(axis=-1)
                right[sample] = bool((said == targets)[targets >= 0].all())
        for dataset, members in split.datasets.items():
            assert point.metrics[dataset] == dataset_metric([float(right[i]) for i in members.tolist()])


def test_resuming_does_nothing_twice(finished: Finished) -> None:
    """From the journal alone, without any scoring, come the same studies, and the journal stays as it was."""
    before = (finished.folder / "journal.jsonl").read_bytes()
    with finished.toy.bench(finished.folder, scoring_of=lambda _: NoScoring(toy_programs())) as bench:
        for name, study in finished.studies.items():
            assert STUDIES[name](bench) == study
    assert (finished.folder / "journal.jsonl").read_bytes() == before


def test_the_journal_keeps_variants_apart(finished: Finished) -> None:
    lines = (finished.folder / "journal.jsonl").read_text().splitlines()[1:]
    lines = [line for line in lines if json.loads(line)["split"] != "validation kl"]
    splits = [json.loads(line)["split"] for line in lines]
    variants = [json.loads(split.split(" ", 1)[1]) if " " in split else {} for split in splits]
    assert {variant["tokens"] for variant in variants if variant} == {"visual", "text"}
    empty = [not (json.loads(line)["attention"] or json.loads(line)["ffn"]) for line in lines]
    alone = [variant.get("pruning") for variant, dense in zip(variants, empty, strict=True) if dense]
    assert {"FastV after layer 2 drops 50 %", "VTW after layer 2"} < set(alone)
    dense = [split for split, variant, none in zip(splits, variants, empty, strict=True) if none and not variant]
    others = [v for v, none in zip(variants, empty, strict=True) if v and none and not v["pruning"]]
    assert set(dense) == {"validation", "test"}
    assert not others  # the dense model is measured once, whatever the variant would have done


class NoScoring:
    """Fails when it is asked to evaluate anything."""

    def __init__(self, programs: Programs):
        self.programs = programs

    def hold(self, *_: object) -> None:
        """No states are made."""

    def start(self, *_: object) -> None:
        raise AssertionError("evaluated again")

    def finish(self, *_: object) -> None:
        raise AssertionError("evaluated again")

    def state_bytes(self, *_: object) -> int:
        return 1

    def release(self) -> None:
        """Nothing is kept."""
