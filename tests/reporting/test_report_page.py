import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.resources import files

import jsonschema
import pytest
from PIL import Image

from rlens_jax.commands.report import main
from rlens_jax.console import BAD_INPUT
from rlens_jax.errors import UserError
from rlens_jax.plans import Plan
from rlens_jax.reporting.chart import BOTTOM, LEFT, RIGHT, SHADES, TOP, Series, curve_chart, nice_ticks, shade, shade_legend
from rlens_jax.reporting.report_files import write_report
from rlens_jax.reporting.report_page import MAX_BYTES, MAX_RUNS, report_html
from rlens_jax.reporting.run_files import MAX_EXAMPLES, MAX_IMAGES, read_run, write_examples
from tests.reporting.runs import ATTACK, examples, write_run
from tests.reporting.synthetic import synthetic_results, with_bounds


class Page(HTMLParser):
    """Tags, their balance, and the visible text of a page."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.data = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.data if self.open and self.open[-1] in ("script", "style") else self.text).append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first", kept=examples())


@pytest.fixture(scope="module")
def page(folder):
    return report_html([read_run(folder)])


@pytest.fixture
def spoil(tmp_path):
    """Writes a run, changes one of its files with a function, and returns the folder."""

    def write(file, change):
        folder = write_run(tmp_path / "run", kept=examples(1))
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))
        return folder

    return write


def test_it_shows_the_values_of_the_files(folder, page):
    ranking = json.loads((folder / "ranking.json").read_text())
    words = Page(page).words.replace("\N{NO-BREAK SPACE}", " ")
    for saving in ranking["savings"].values():
        assert f"{100 * saving['flops_saved_with_probes']:.1f} %" in words
    for operator in ranking["held_out"].values():
        for point in operator["curves"]["searched"]["points"]:
            assert f"{100 * point['mean']:.1f} %" in words
    assert "110.0 80.0 27.3 %" in words  # medians of the times, in ms, and the share saved
    assert "FLOPs saved, counted" in words and "prefill, measured" in words
    assert "attention range 16" in words
    assert "jax 0.10.2" in words
    assert "nineteen ninety-eight" in words
    assert "bootstrap_samples: 100" in words  # the exact configuration


def test_every_candidate_of_every_round_is_a_cell(folder, page):
    ranking = json.loads((folder / "ranking.json").read_text())
    rounds = [round_ for search in ranking["search"].values() for round_ in search["rounds"]]
    cells = [attributes for _, attributes in Page(page).tags if "data-tip" in attributes]
    assert len(cells) == sum(len(round_["candidates"]) for round_ in rounds) == 2 * 45
    chosen = [cell["data-tip"] for cell in cells if "chosen" in cell["class"]]
    assert [int(re.search(r"layer (\d+), chosen", tip)[1]) for tip in chosen] == [r["chosen"] for r in rounds]


def test_a_one_shot_ranking_is_called_one(tmp_path, page):
    results = synthetic_results(samples=20, num_random=0, method="one_shot")
    words = Page(report_html([read_run(write_run(tmp_path / "run", results))])).words
    assert words.count("Hollow Attention, one-shot") >= 3  # the rankings, the curves and the scores
    assert "the others sorted by their scores in one round (one-shot, no greedy search)" in words
    assert "one-shot" not in Page(page).words


def test_without_random_rankings_nobody_speaks_of_chance(tmp_path):
    page = report_html([read_run(write_run(tmp_path / "run", synthetic_results(samples=20, num_random=0)))])
    words = Page(page).words
    assert "Does the search beat position?" in words
    shown = words.replace("random_rankings: 0", "")  # the configuration
    assert "random" not in shown and "chance" not in shown and "Whiskers" not in shown
    assert re.search(r"(does not beat position|beats position: the interval of the difference lies)", words)


def test_candidates_that_stopped_early_are_hatched_and_called_bounds(page, tmp_path):
    results = with_bounds(synthetic_results(samples=20))
    stopped = sum(result.ranking.stopped_early for result in results.operators.values())
    parsed = Page(report_html([read_run(write_run(tmp_path / "run", results))]))
    cells = [attributes for _, attributes in parsed.tags if "bound" in attributes.get("class", "").split()]
    assert len(cells) == stopped > 30
    assert all(
        re.search(r"layer \d+, stopped early: score at most .*, loss at least .*; at most", cell["data-tip"]) for cell in cells
    )
    assert f"Hatched: {stopped} candidates whose evaluation stopped early" in parsed.words
    assert "Hatched" not in Page(page).words


def test_nothing_of_the_files_becomes_markup(page):
    parsed = Page(page)
    assert " ".join(ATTACK.split()) in parsed.words
    assert [tag for tag, _ in parsed.tags].count("script") == 3  # two charts' data and our own
    assert not [a for _, a in parsed.tags if any(name.startswith("on") for name in a)]
    assert [tag for tag, _ in parsed.tags].count("img") == 5


def test_names_of_datasets_models_and_runs_are_escaped_too(tmp_path):
    results = synthetic_results(samples=20)
    evil = "<img src=x onerror=alert(1)></script>"
    config = dataclasses.replace(results.config, model=evil)
    folder = write_run(tmp_path / "run", dataclasses.replace(results, config=config))
    ranking = (folder / "ranking.json").read_text().replace("pages_read", evil)
    (folder / "ranking.json").write_text(ranking)
    run = dataclasses.replace(read_run(folder), name=evil)
    parsed = Page(report_html([run, run]))
    assert "img" not in [tag for tag, _ in parsed.tags]
    assert evil in parsed.words


def test_it_needs_no_other_file_and_its_policy_forbids_them(page):
    for tag, attributes in Page(page).tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in page and "url(" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy and "http" not in policy


def test_the_deepest_run_with_all_examples_stays_below_3_mb(tmp_path):
    results = synthetic_results(80, 20)
    folder = write_run(tmp_path / "deep", results, examples(MAX_EXAMPLES, (1600, 1600)))
    page = report_html([read_run(folder)])
    assert len(page.encode()) <= 0.8 * MAX_BYTES
    images = [attributes for tag, attributes in Page(page).tags if tag == "img"]
    assert len(images) == sum(min(MAX_IMAGES, 1 + number % 3) for number in range(MAX_EXAMPLES))
    image = Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2])))
    assert image.size == (int(images[0]["width"]), int(images[0]["height"])) == (448, 448)


def test_two_runs_stand_side_by_side(folder, tmp_path):
    other = write_run(tmp_path / "other", synthetic_results(8, 20, operators=("ffn",)))
    page = report_html([read_run(folder), read_run(other)])
    words = Page(page).words
    assert "2 runs side by side" in words and "A first" in words and "B other" in words
    assert 'search.operators ["attention", "ffn"] ["ffn"]' in words
    assert "reduced layers, % of all" in words  # different numbers of layers
    same = Page(report_html([read_run(folder)] * 2)).words
    assert "Nowhere." in same and "% of all" not in same


def test_too_many_runs_are_refused(folder, monkeypatch):
    run = read_run(folder)
    with pytest.raises(UserError, match="at most 8 runs side by side, not 9"):
        report_html([run] * (MAX_RUNS + 1))
    monkeypatch.setattr("rlens_jax.reporting.report_page.MAX_BYTES", 100_000)
    with pytest.raises(UserError, match=r"would have 0\.\d MB, more than 0\.1; name fewer runs"):
        report_html([run] * 2)


def test_a_run_without_examples_says_so_and_one_without_times_too(tmp_path):
    results = synthetic_results(samples=20, operators=("ffn",))
    timing = dataclasses.replace(results.timing, prefill={})
    words = Page(report_html([read_run(write_run(tmp_path / "run", dataclasses.replace(results, timing=timing)))])).words
    assert "This run kept no examples." in words
    assert "not measured" in words and "Measured :" not in words


def test_every_run_writes_it_and_the_command_rebuilds_the_same(tmp_path, capsys):
    results, folder = synthetic_results(samples=20), tmp_path / "run"
    folder.mkdir()
    write_examples(folder, examples(1), plan=Plan(), model_hash=results.model_hash, data_hash=results.data_hash)
    write_report(results, folder)
    written = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    main([str(folder)])
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_bytes() == written
    assert "nineteen ninety-eight" in written.decode()
    schema = json.loads(files("rlens_jax.reporting").joinpath("examples.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((folder / "examples.json").read_text()), schema)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "rlens_jax.report", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == BAD_INPUT
    assert run.stderr == f"error: {tmp_path} has no ranking.json: no ranking run was finished there\n"


def test_what_is_missing_or_unreadable_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent is not a folder; name the output folder"):
        read_run(tmp_path / "absent")
    folder = write_run(tmp_path / "run")
    (folder / "timing.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*timing\.json: No such file"):
        read_run(folder)
    for content, complaint in (
        (b"{", r"ranking\.json: not valid JSON: Expecting property name.*, line 1"),
        (b'{"schema": NaN}', r"ranking\.json: not valid JSON: NaN is not a number"),
        (b"\xff", r"ranking\.json: not UTF-8 text"),
        (b"[" * 100_000, r"ranking\.json: not valid JSON: too deeply nested"),
        (b"[]", r"ranking\.json is not the ranking\.json of a run .*, not None"),
    ):
        (folder / "ranking.json").write_bytes(content)
        (folder / "timing.json").write_text("{}")
        with pytest.raises(UserError, match=complaint):
            read_run(folder)


def _set(*path, to):
    def change(value):
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


def jpeg_that_claims(side: int) -> str:
    """A small JPEG, in base64, whose header has another size: decoding it takes 12 GB."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = 2 * side.to_bytes(2, "big")
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("ranking.json", _set("schema", to="rlens-ranking/2"), r"its schema must be 'rlens-ranking/1', not 'rlens-ranking/2'"),
        ("ranking.json", lambda v: v.pop("savings"), r"ranking\.json: 'savings' is a dependency of 'held_out'"),
        (
            "ranking.json",
            _set("held_out", "ffn", "curves", "searched", "points", 3, "mean", to="high"),
            r"held_out\.ffn\.curves\.searched\.points\[3\]\.mean: 'high' is not of type 'number'",
        ),
        ("ranking.json", _set("rankings", "ffn", 0, to=12), r"rankings\.ffn: must name each of the layers 0 to 11 once"),
        (
            "ranking.json",
            lambda v: v["held_out"]["ffn"]["curves"]["position"]["points"].pop(),
            r"curves\.position\.points: must have 0, 1, \.\.\. 12 reduced layers",
        ),
        ("ranking.json", _set("search", "ffn", "rounds", 0, "chosen", to=11), r"rounds\[0\]\.chosen: layer 11 was no"),
        ("ranking.json", _set("savings", "both", "plan", "ffn", to=[99]), r"savings\.both\.plan\.ffn: there is no layer 99"),
        ("ranking.json", lambda v: v["savings"].pop("both"), r"savings: must have the plans attention, ffn, both"),
        ("ranking.json", lambda v: v["dense"]["validation"].popitem(), r"data\.samples\.validation: must have the datasets"),
        ("ranking.json", lambda v: v["configuration"].pop("reduction"), r"configuration: 'reduction' is a required"),
        (
            "ranking.json",
            lambda v: v["held_out"]["ffn"]["random"]["rankings"][0]["means"].pop(),
            r"random\.rankings\[0\]\.means: must be 5 numbers, not 4",
        ),
        ("timing.json", _set("prefill", "ffn", "dense", to=[0]), r"timing\.json: prefill\.ffn\.dense\[0\]: 0 is less"),
        ("timing.json", _set("device", to={"long": "x" * 999}), r"device: .{0,170} is not of type 'string'$"),
        ("examples.json", _set("model_hash", to="other"), r"examples\.json: model_hash: differs from ranking\.json"),
        ("examples.json", _set("plan", "ffn", to=[12]), r"plan\.ffn: there is no layer 12; the model has 12"),
        (
            "examples.json",
            _set("examples", 0, "images", 0, "base64", to="AAAA"),
            r"examples\[0\]\.images\[0\]\.base64: is not a JPEG in base64",
        ),
        (
            "examples.json",
            _set("examples", 0, "images", 0, "base64", to=jpeg_that_claims(65_000)),
            r"examples\[0\]\.images\[0\]\.base64: is not a JPEG in base64",
        ),
        ("examples.json", _set("examples", 0, "dense", "score", to=2), r"examples\[0\]\.dense\.score: 2 is greater"),
    ],
)
def test_contradictions_name_file_and_field(spoil, file, change, complaint):
    folder = spoil(file, change)
    with pytest.raises(UserError, match=complaint) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


def test_more_examples_than_a_report_shows_are_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="9 examples; a report shows at most 8"):
        write_examples(tmp_path, examples(9), plan=Plan(), model_hash="", data_hash="")


def test_ticks_are_round_and_hold_the_values():
    assert nice_ticks(0.77, 0.978, 5) == pytest.approx([0.75, 0.8, 0.85, 0.9, 0.95, 1.0])
    assert nice_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    ticks = nice_ticks(0.5, 0.5, 5)
    assert ticks[0] <= 0.5 < ticks[-1]


def test_points_lie_where_their_values_are_and_labels_lie_apart():
    x = tuple(map(float, range(11)))
    high, low = tuple(1 - 0.01 * k for k in x), tuple(1 - 0.05 * k for k in x)
    curves = [Series(name, name, name, x, y, y, y, ("",) * 11) for name, y in (("lower", low), ("upper", high))]
    texts = {"x_end": 10, "x_title": "x", "y_title": "y", "step_title": "{x} layers"}
    chart = curve_chart("title", curves, [], **texts, reference=1.0)
    assert (chart.y_ticks[0].text, chart.y_ticks[-1].text) == ("50", "100")
    assert chart.series[0].points[0][:2] == (LEFT, TOP)
    assert chart.series[0].points[-1][:2] == (RIGHT, BOTTOM)
    assert chart.steps[3].readings[1].value == "97.0 %"
    front, back = chart.labels
    assert (front.text, back.text) == ("upper", "lower")
    assert abs(front.x - back.x) > 30 or abs(front.y - back.y) > 15


def test_shades_go_with_the_root_of_the_harm():
    assert [shade(score, -1.0) for score in (0.1, 0.0, -1e-6, -0.25, -1.0)] == [0, 0, 1, SHADES // 2, SHADES]
    legend = shade_legend(-1.0)
    assert len(legend) == SHADES + 1
    assert legend[-1] == "\N{MINUS SIGN}1"


def test_texts_can_be_read_in_both_themes():
    css = files("rlens_jax.reporting").joinpath("report.css").read_text()
    colours = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", css)}

    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        darker, lighter = sorted((luminance(a), luminance(b)))
        return (lighter + 0.05) / (darker + 0.05)

    texts = ["ink", "soft", "accent", "good", "bad", "searched", "search-all", "position", "random", *"ABCDEFGH"]
    for theme in (0, 1):
        for text in texts:
            for ground in ("paper", "panel"):
                assert contrast(colours[text][theme], colours[ground][theme]) >= 4.5, (text, ground, theme)
        assert contrast(colours["on-accent"][theme], colours["accent"][theme]) >= 4.5
