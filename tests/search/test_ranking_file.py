import dataclasses
import json
from importlib.resources import files

import jsonschema
import pytest

from rlens_jax.errors import UserError
from rlens_jax.files import json_text, replace_file
from rlens_jax.plan_file import read_plan
from rlens_jax.plans import Plan
from rlens_jax.search.ranking_file import ranking_fields, read_ranking
from tests.reporting.synthetic import only_searched, synthetic_results, with_bounds

SCHEMA = json.loads(files("rlens_jax.search").joinpath("ranking.schema.json").read_text())


@pytest.fixture(scope="module", params=["both", "with search_all", "ffn only"])
def results(request):
    if request.param == "ffn only":
        return synthetic_results(operators=("ffn",))
    return synthetic_results(with_search_all=request.param == "with search_all")


def test_it_follows_its_schema(results):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(json_text(ranking_fields(results))), SCHEMA)


def test_it_says_how_images_were_read(results):
    for source, orientation in (("my.jsonl", "applied"), ("pages", "applied"), ("mixture.json", "as stored")):
        config = dataclasses.replace(results.config, data=dataclasses.replace(results.config.data, source=source))
        found = ranking_fields(dataclasses.replace(results, config=config))
        assert found["data"]["orientation"] == orientation
        jsonschema.validate(json.loads(json_text(found)), SCHEMA)


def test_the_schema_knows_every_field_of_it(results):
    found = json.loads(json_text(ranking_fields(results)))
    for spoil in ("rankings", "model", "search", "held_out", "savings"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({name: value for name, value in found.items() if name != spoil}, SCHEMA)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**found, spoil: {**found[spoil], "unknown": 1}}, SCHEMA)


def test_it_holds_the_rankings_and_every_evaluation_of_the_search(results):
    found = json.loads(json_text(ranking_fields(results)))
    for operator, result in results.operators.items():
        assert found["rankings"][operator] == list(result.ranking.order)
        search = found["search"][operator]
        assert sum(len(round_["candidates"]) for round_ in search["rounds"]) == 9 * 10 / 2
        assert len(search["dense_and_position"]) == 4
        assert search["scores"][4:] == [round_["score"] for round_ in search["rounds"]]
        tried = search["rounds"][0]["candidates"]
        chosen = next(item for item in tried if item["layer"] == search["rounds"][0]["chosen"])
        assert chosen["score"] == max(item["score"] for item in tried)
        assert [point["num_reduced"] for point in found["held_out"][operator]["curves"]["searched"]["points"]] == [*range(13)]


def test_it_says_how_the_layers_were_ranked(tmp_path):
    one_shot = json.loads(json_text(ranking_fields(synthetic_results(samples=20, num_random=0, method="one_shot"))))
    jsonschema.validate(one_shot, SCHEMA)
    assert {search["method"] for search in one_shot["search"].values()} == {"one_shot"}
    assert one_shot["configuration"]["search"]["method"] == "one_shot"
    assert len(one_shot["search"]["ffn"]["rounds"]) == 1
    assert len(one_shot["search"]["ffn"]["scores"]) == 3 + 2  # the base, the layers by position, and the first one of the others
    assert ranking_fields(synthetic_results())["search"]["ffn"]["method"] == "greedy"
    for search in one_shot["search"].values():
        del search["method"]  # as in files of earlier versions
    (tmp_path / "ranking.json").write_text(json.dumps(one_shot))
    read_ranking(tmp_path / "ranking.json")


def test_random_rankings_are_compared_everywhere_or_nowhere(tmp_path):
    path = tmp_path / "ranking.json"
    found = json.loads(json_text(ranking_fields(synthetic_results(samples=20, num_random=0))))
    jsonschema.validate(found, SCHEMA)
    path.write_text(json.dumps(found))
    held_out = read_ranking(path).fields["held_out"]["ffn"]
    assert held_out["random"]["rankings"] == []
    assert held_out["areas"].keys() == {"searched", "position"}
    for part in ("areas", "margins"):
        spoilt = json.loads(json.dumps(found))
        spoilt["held_out"]["ffn"][part]["random"] = held_out[part]["position"]
        path.write_text(json.dumps(spoilt))
        with pytest.raises(UserError, match=rf"held_out\.ffn\.{part}: must have the strategies .*position"):
            read_ranking(path)


def test_bounds_are_marked_and_lie_below_the_score_of_their_round(results, tmp_path):
    found = json.loads(json_text(ranking_fields(with_bounds(results))))
    jsonschema.validate(found, SCHEMA)
    plain = ranking_fields(results)
    for operator, search in found["search"].items():
        pairs = zip(search["rounds"], plain["search"][operator]["rounds"], strict=True)
        candidates = [pair for ours, others in pairs for pair in zip(ours["candidates"], others["candidates"], strict=True)]
        stopped = [ours for ours, _ in candidates if ours.pop("bound", None)]
        assert len(stopped) == with_bounds(results).operators[operator].ranking.stopped_early > 15
        assert all(ours == others for ours, others in candidates)
    path = tmp_path / "ranking.json"
    round_ = found["search"]["ffn"]["rounds"][1]
    for place, candidate in enumerate(round_["candidates"]):
        candidate["bound"] = True
        path.write_text(json.dumps(found))
        if candidate["score"] < round_["score"]:
            read_ranking(path)
        else:
            message = rf"search\.ffn\.rounds\[1\]\.candidates\[{place}\]\.score: a bound must be below the score of the round"
            with pytest.raises(UserError, match=message):
                read_ranking(path)
            del candidate["bound"]
    candidate["bound"] = False
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"bound: True was expected"):
        read_ranking(path)


def test_nothing_in_it_depends_on_time_or_place(results):
    timing = dataclasses.replace(results.timing, started="later", seconds={}, compilations=0, prefill={})
    config = dataclasses.replace(results.config, output="elsewhere")
    again = ranking_fields(dataclasses.replace(results, timing=timing, config=config))
    assert json_text(again) == json_text(ranking_fields(results))


def test_it_is_read_as_it_was_written(results, tmp_path):
    path = replace_file(tmp_path / "ranking.json", json_text(ranking_fields(results)).encode())
    ranking = read_ranking(path)
    assert ranking.fields == json.loads(json_text(ranking_fields(results)))
    assert ranking.orders == {operator: result.ranking.order for operator, result in results.operators.items()}
    assert (ranking.model_hash, ranking.num_layers) == (results.model_hash, results.num_layers)
    assert ranking.base == Plan()
    assert ranking.reduction == results.config.reduction


@pytest.mark.parametrize("provisional", [True, False])
def test_rankings_without_curves_are_written_and_read(provisional, tmp_path):
    found = only_searched(synthetic_results(), provisional, operators=("ffn",))
    fields = ranking_fields(found)
    assert not {"held_out", "savings"} & set(fields)
    path = replace_file(tmp_path / "ranking.json", json_text(fields).encode())
    ranking = read_ranking(path)
    assert ranking.provisional == provisional
    assert ranking.orders == {"ffn": found.rankings["ffn"].order}
    plan = read_plan(path, {"ffn": 2}).plan
    assert plan == Plan(ffn=tuple(sorted(found.rankings["ffn"].order[:2])))
    more = "; the file is provisional, its run goes on or was stopped" if provisional else ""
    with pytest.raises(UserError, match=f"ranks ffn, so there are no first layers of attention{more}$"):
        read_plan(path, {"attention": 2})


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [("held_out", "'held_out' is a dependency of 'savings'"), ("dense.test", "dense.test: must be there if and only if")],
)
def test_curves_are_there_as_a_whole_or_not_at_all(missing, complaint, tmp_path):
    fields = json.loads(json_text(ranking_fields(synthetic_results())))
    *within, name = missing.split(".")
    del (fields[within[0]] if within else fields)[name]
    path = replace_file(tmp_path / "ranking.json", json_text(fields).encode())
    with pytest.raises(UserError, match=complaint):
        read_ranking(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read .*ranking.json: No such file"),
        ("{", "not valid JSON"),
        ("[1]", "is not the ranking.json of a run of rlens_jax.rank: its schema must be 'rlens-ranking/1', not None"),
        ('{"schema": "rlens-study/1"}', "must be 'rlens-ranking/1', not 'rlens-study/1'"),
        ('{"schema": "rlens-ranking/1"}', "'rankings' is a required property"),
    ],
)
def test_what_is_no_ranking_is_named(tmp_path, content, complaint):
    path = tmp_path / "ranking.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        read_ranking(path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"num_layers": 12', '"num_layers": 1000000', "model.num_layers: 1000000 is greater than the maximum of 1000"),
        ('"num_layers": 12', '"num_layers": 12.0', "model.num_layers: 12.0 is not of type 'integer'"),
        ('"num_layers": 12', f'"num_layers": {10**30}', f"model.num_layers: the number {10**30} is too large"),
        ('"num_layers": 12', '"num_layers": 1e308', r"model.num_layers: the number 1e\+308 is too large"),
        ('"score": ', '"score": 1e999, "loss": ', "the number 1e999 is too large"),
        ('"score": ', '"score": Infinity, "loss": ', "Infinity is not a number"),
    ],
)
def test_absurd_numbers_are_refused(results, old: str, new: str, complaint: str, tmp_path) -> None:
    path = tmp_path / "ranking.json"
    path.write_text(json_text(ranking_fields(results)).replace(old, new, 1))
    with pytest.raises(UserError, match=complaint):
        read_ranking(path)


def test_a_file_of_too_many_values_is_refused_at_once(results, tmp_path) -> None:
    path = tmp_path / "ranking.json"
    fields = ranking_fields(results)
    path.write_text(json.dumps({**fields, "search": [0] * 400_000}))
    with pytest.raises(UserError, match="has more than 300,000 values, so it is no such file"):
        read_ranking(path)
