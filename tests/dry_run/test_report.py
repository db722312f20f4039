import json
from dataclasses import replace
from importlib.resources import files
from typing import Any

import jsonschema
import pytest

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.config import ComputeConfig, ReportConfig, RunConfig
from rlens_jax.dry_run.advice import to_finish
from rlens_jax.dry_run.costs import Branch, Collective, Cost, ProgramCost
from rlens_jax.dry_run.data_sizes import DataSizes, Row
from rlens_jax.dry_run.dry_run import DryRun, to_compile
from rlens_jax.dry_run.dry_run_report import ASSUMPTIONS, WIDTH, document, terminal
from rlens_jax.dry_run.estimate import Links, program_times
from rlens_jax.dry_run.hlo import Shape
from rlens_jax.dry_run.program import Memory, Program, refusal
from rlens_jax.dry_run.topology import find_slice
from rlens_jax.dry_run.workload import Sizes, workload
from rlens_jax.engine.shapes import Shapes
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket
from rlens_jax.resources import embedded_model
from tests.dry_run.programs import GIB, compiled, spec

SCHEMA = json.loads(files("rlens_jax.dry_run").joinpath("dry_run.schema.json").read_text())
CONFIG = RunConfig(compute=ComputeConfig(dtype="float32", batch_size=4, model_shards=1), report=ReportConfig(random_rankings=2))
STATES = Shape("bf16", (4, 96, 64))
REDUCE = Collective("all-reduce", (STATES,), (STATES,), "model", 4, True, (), 28)
OOM = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal hbm usage >= 20.75G:\n"
)


LAYERS = 12
BUCKET = Bucket(32, 64)
SHAPES = Shapes((BUCKET,), ((512,),), lambda size: (), 1)
ROWS = {name: (Row("d", (20, 50), ((500,),), 4, 6, 250),) * 40 for name in ("validation", "test")}
LINKS = Links(50e9, 100e9)


def result_of(kind: ModelKind, *programs: Program) -> DryRun:
    target, data = find_slice("v5e:4x4"), DataSizes(ROWS, "of own.jsonl", ("Nothing is assumed of the rows.",))
    counts = workload(CONFIG, Sizes(LAYERS, 4, 10), SHAPES, ROWS)
    times = program_times(programs, target, LINKS, 10.0)
    return DryRun(CONFIG, kind, target, (4, 4), LINKS, data, SHAPES, programs, counts, times)


def fitting(kind: ModelKind) -> DryRun:
    cost = ProgramCost(Cost(1e15, 2e9), Cost(1e14, 2e8))
    gather = replace(REDUCE, kind="all-gather", branches=(Branch("ffn", 1),))
    return result_of(
        kind,
        compiled("encode", "patches 512", slots=512),
        compiled("embed"),
        compiled("layers", layers=28, dense=cost, collectives=[REDUCE, gather]),
        compiled("last layer"),
        compiled("outcome"),
    )


@pytest.fixture(scope="module")
def kind() -> ModelKind:
    return read_model_kind(embedded_model())


def read(run: DryRun) -> dict[str, Any]:
    return json.loads(document(run, None))


def test_the_json_follows_its_schema(kind: ModelKind) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(read(fitting(kind)), SCHEMA)
    jsonschema.validate(read(result_of(kind, refusal(spec("layers"), OOM, 1.0))), SCHEMA)


def test_the_schema_knows_every_field(kind: ModelKind) -> None:
    whole = read(fitting(kind))
    for name in set(whole) - {"configuration"}:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in whole.items() if key != name}, SCHEMA)
    for place in (whole, whole["topology"], whole["programs"][0], whole["programs"][2]["collectives"][0]):
        place["unknown"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(whole, SCHEMA)
        del place["unknown"]


def test_what_fits(kind: ModelKind) -> None:
    run, text = fitting(kind), terminal(fitting(kind), None)
    assert run.fits
    assert read(run)["advice"] == []
    assert "What would help" not in text
    for part in (
        "chips: 16, hosts: 4, mesh: 4 x 4",
        "a program can use 15.75;",
        "7.50  fits",
        "layers (text 32, visual 64), dense: 1 all-reduce of bf16[4,96,64] (0.05 MB) over model",
        "reduced: 1 all-reduce of bf16[4,96,64] (0.05 MB) over model, 1 all-gather",
        "ESTIMATE",
        "Sizes of rows and images: of own.jsonl.",
        "sharing: 480 prompts with answers of 320 samples are 80 rows; tokens 5,600 instead of 20,000 (0.28)",
        "fill: 61% of the slots of 4 work groups hold tokens",
        "links: 4 devices of a copy of the model send 50 GB/s each",
        "chip-hours",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_assumptions_are_written_out(kind: ModelKind) -> None:
    text = " ".join(terminal(fitting(kind), None).split())
    for line in (*ASSUMPTIONS, "Nothing is assumed of the rows."):
        assert line in text


def test_a_program_that_compiles_but_does_not_fit(kind: ModelKind) -> None:
    large = Memory(14 * GIB, GIB, 0, 2 * GIB, round(15.75 * GIB))
    run = result_of(
        kind,
        compiled("encode", "patches 512", slots=512),
        compiled("embed"),
        compiled("layers", layers=28, memory=large),
        compiled("last layer"),
        compiled("outcome"),
    )
    text = terminal(run, None)
    assert not run.fits
    assert "17.00  DOES NOT FIT" in text
    assert "compute.state_memory_gb: lower it by 1.3 or more" in text


def test_a_program_that_the_compiler_refuses(kind: ModelKind) -> None:
    run = result_of(kind, refusal(spec("layers"), OOM, 1.0))
    text = terminal(run, None)
    assert "20.50  DOES NOT FIT" in text
    assert "No estimate" in text
    for field in ("compute.dtype: bfloat16", "compute.batch_size: below 4", "compute.visual_slots"):
        assert field in text
    assert read(run)["programs"][0]["needed_bytes"] == round(20.5 * GIB)


def test_images_that_do_not_fit(kind: ModelKind) -> None:
    text = terminal(result_of(kind, refusal(spec("encode"), OOM, 1.0)), None)
    assert "compute.patch_slots" in text
    assert "compute.visual_slots" not in text


def test_another_reason_than_memory(kind: ModelKind) -> None:
    text = terminal(result_of(kind, refusal(spec("layers"), "INTERNAL: Mosaic failed\nmore", 1.0)), None)
    assert "NOT COMPILED" in text
    assert "INTERNAL: Mosaic failed" in text
    assert "for another reason than memory" in text


def test_what_to_change_for_less_time(kind: ModelKind) -> None:
    run = fitting(kind)
    assert run.estimate is not None
    minutes = run.estimate.likely / 60
    assert to_finish(run, minutes) == []
    assert f"less than {2 * minutes:g} minutes" in terminal(run, 2 * minutes)
    lines = to_finish(run, 0.7 * minutes)
    found = {line.rsplit(": ", 1)[0]: float(line.rsplit(": ", 1)[1].split()[0]) for line in lines}
    # Twice the chips, or half of the samples, take about half of the time.
    for name in ("--dry-run v5e:4x8, 2 times as many chips", "half of the samples (data.validation_samples, data.test_samples)"):
        assert found[name] < 0.6 * minutes
    assert {"report.random_rankings: 0", "search.operators: attention alone", "search.method: one_shot, an approximation"} < set(
        found
    )
    assert sorted(found.values()) == list(found.values())
    assert "not enough alone" in lines[-1]
    assert all(line in terminal(run, 0.7 * minutes) for line in lines)
    assert json.loads(document(run, 0.7 * minutes))["advice"] == lines


def test_the_buckets_with_most_of_the_work_are_compiled() -> None:
    sizes = [(20, visual) for visual in (100, 400, 700, 1000) for _ in range(10)] + [(20, 200)] * 60
    buckets = tuple(Bucket(32, visual) for visual in (100, 200, 400, 700, 1000))
    shapes = Shapes(buckets, ((512,),), lambda size: (), 1)
    rows = tuple(Row("d", size, ((500,),), 1, 1, 1) for size in sizes)
    work = workload(CONFIG, Sizes(LAYERS, 1, 10), shapes, {"validation": rows, "test": rows})
    few, images = to_compile(work, shapes, everything=False)
    assert list(few) == [Bucket(32, 200), Bucket(32, 1000)]
    assert images == {(512,): 4}
    assert list(to_compile(work, shapes, everything=True)[0]) == list(buckets)
