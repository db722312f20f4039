import dataclasses
import json
from importlib.resources import files

import jsonschema
import pytest

from rlens_jax.reporting.ranking_json import ranking_json, timing_json
from tests.reporting.synthetic import synthetic_results

SCHEMA = json.loads(files("rlens_jax.reporting").joinpath("ranking.schema.json").read_text())


@pytest.fixture(scope="module", params=["both", "with search_all", "ffn only"])
def results(request):
    if request.param == "ffn only":
        return synthetic_results(operators=("ffn",))
    return synthetic_results(with_search_all=request.param == "with search_all")


def test_it_follows_its_schema(results):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(ranking_json(results)), SCHEMA)


def test_the_schema_knows_every_field_of_it(results):
    found = json.loads(ranking_json(results))
    for spoil in ("rankings", "model", "search", "held_out", "savings"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({name: value for name, value in found.items() if name != spoil}, SCHEMA)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**found, spoil: {**found[spoil], "unknown": 1}}, SCHEMA)


def test_it_holds_the_rankings_and_every_evaluation_of_the_search(results):
    found = json.loads(ranking_json(results))
    for operator, result in results.operators.items():
        assert found["rankings"][operator] == list(result.ranking.order)
        search = found["search"][operator]
        assert sum(len(round_["candidates"]) for round_ in search["rounds"]) == 9 * 10 / 2
        assert len(search["dense_and_position"]) == 4
        assert search["scores"][4:] == [round_["score"] for round_ in search["rounds"]]
        tried = search["rounds"][0]["candidates"]
        chosen = next(item for item in tried if item["layer"] == search["rounds"][0]["chosen"])
        assert chosen["score"] == max(item["score"] for item in tried)
        assert [point["num_reduced"] for point in found["held_out"][operator]["curves"]["searched"]["points"]] == [
            *range(13)
        ]


def test_nothing_in_it_depends_on_time_or_place(results):
    timing = dataclasses.replace(results.timing, started="later", seconds={}, compilations=0, prefill={})
    config = dataclasses.replace(results.config, output="elsewhere")
    assert ranking_json(dataclasses.replace(results, timing=timing, config=config)) == ranking_json(results)


def test_timing_holds_the_rest(results):
    timing = json.loads(timing_json(results.timing))
    assert timing["seconds"]["search"] == 100
    assert timing["prefill"]["ffn"]["dense"] == [0.1, 0.12, 0.11]
