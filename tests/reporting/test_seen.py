"""seen.json and its section: written, read, refused, and shown."""

import json
import re
from importlib.resources import files

import jsonschema
import numpy as np
import pytest
from PIL import Image

from rlens_jax.config import MAX_SEEN, ReportConfig
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.plans import Reduction
from rlens_jax.reporting.report_page import MAX_BYTES, report_html
from rlens_jax.reporting.run_files import read_run
from rlens_jax.reporting.seen_files import SEEN, SeenSample, write_seen
from tests.reporting.runs import ATTACK, write_run
from tests.reporting.synthetic import synthetic_results

LAYERS, GRID = 12, (4, 8)


def samples(count, grid=GRID, side=600):
    rng = np.random.default_rng(0)
    return [
        SeenSample(
            sample=Sample(f"pages/{number}", "pages", (), ATTACK, ("1",)),
            image=Image.fromarray(rng.integers(0, 255, (side, 2 * side, 3), np.uint8)),
            grid=grid,
            attention=rng.random(LAYERS),
            overlap=rng.random(LAYERS),
            attention_map=rng.random(32) / 50,
            survival_map=rng.random(32),
        )
        for number in range(count)
    ]


def write(folder, seen):
    results = synthetic_results(LAYERS, 20)
    write_run(folder, results)
    write_seen(folder, seen, Reduction(), 40, model_hash=results.model_hash, data_hash=results.data_hash)
    return folder


@pytest.mark.slow
def test_the_section_shows_each_sample_and_stays_small(tmp_path):
    folder = write(tmp_path / "run", [*samples(1), *samples(1, grid=None)])
    fields = json.loads((folder / SEEN).read_text())
    jsonschema.validate(fields, json.loads(files("rlens_jax.reporting").joinpath("seen.schema.json").read_text()))
    assert (fields["units"], fields["ffn_width"]) == (8, 40)
    page = report_html([read_run(folder)])
    assert page.count("data:image/png;base64,") == 1 + 2
    assert "<script>document.title" not in page and "The redundancy seen" in page
    assert page.count("its tokens are no grid over the image") == 1
    means = [100 * np.mean(sample["attention"]) for sample in fields["samples"]]
    shown = [float(text) for text in re.findall(r"([\d.]+) % of the text's attention", page)]
    assert shown == pytest.approx(means, abs=0.051)
    pictures = [len(picture) for picture in re.findall(r"data:image/png;base64,([^\"]*)", page)]
    assert len(page) + (MAX_SEEN - 2) * max(pictures) <= MAX_BYTES  # noise is the largest image there is


def test_a_run_without_samples_has_no_section(tmp_path):
    assert "The redundancy seen" not in report_html([read_run(write_run(tmp_path / "run"))])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v: v.update(model_hash="other"), r"seen\.json: model_hash: differs from ranking\.json"),
        (lambda v: v["samples"][0]["attention"].pop(), r"samples\[0\]\.attention: must have a number for each of the 12 layers"),
        (lambda v: v["samples"][0]["survival_map"].pop(), r"samples\[0\]: its maps and grid differ in the number of tokens"),
        (lambda v: v["samples"][0].update(grid=[4, 9]), r"samples\[0\]: its maps and grid differ"),
        (lambda v: v["samples"][0]["image"].update(base64="AAAA"), r"samples\[0\]\.image\.base64: is not a JPEG"),
        (lambda v: v["samples"].clear(), r"samples"),
    ],
)
def test_what_is_wrong_is_named(change, complaint, tmp_path):
    folder = write(tmp_path / "run", samples(1, side=8))
    fields = json.loads((folder / SEEN).read_text())
    change(fields)
    (folder / SEEN).write_text(json.dumps(fields))
    with pytest.raises(UserError, match=complaint):
        read_run(folder)


@pytest.mark.parametrize(("number", "complaint"), [(7, "must be at most 6, not 7"), (-1, "must be at least 0, not -1")])
def test_a_report_has_few_samples(number, complaint):
    with pytest.raises(UserError, match=f"report.samples {complaint}"):
        ReportConfig(samples=number)
