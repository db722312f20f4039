import json
from dataclasses import replace
from importlib.resources import files
from typing import Any

import jsonschema
import pytest

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.config import ComputeConfig, RunConfig
from rlens_jax.dry_run.costs import Collective
from rlens_jax.dry_run.dry_run import ASSUMPTIONS, DryRun, estimates
from rlens_jax.dry_run.dry_run_report import WIDTH, document, terminal
from rlens_jax.dry_run.hlo import Shape
from rlens_jax.dry_run.program import Memory, Program, refusal
from rlens_jax.dry_run.topology import find_slice
from rlens_jax.dry_run.workload import Sizes, workload
from rlens_jax.families.registry import ModelKind
from rlens_jax.resources import embedded_model
from tests.dry_run.programs import GIB, compiled, spec

SCHEMA = json.loads(files("rlens_jax.dry_run").joinpath("dry_run.schema.json").read_text())
CONFIG = RunConfig(compute=ComputeConfig(dtype="float32", batch_size=4, model_shards=1))
STATES = Shape("bf16", (4, 96, 64))
REDUCE = Collective("all-reduce", (STATES,), (STATES,), "model", 4, True, "", 28)
OOM = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal hbm usage >= 20.75G:\n"
)


def result_of(kind: ModelKind, *programs: Program) -> DryRun:
    target, counts = find_slice("v5e:4x4"), workload(CONFIG, Sizes(12, 4, 10))
    return DryRun(CONFIG, kind, target, (4, 4), programs, counts, estimates(programs, counts.phases, target))


def fitting(kind: ModelKind) -> DryRun:
    return result_of(
        kind,
        compiled("encode", "patches 512"),
        compiled("embed"),
        compiled("layers", layers=28, collectives=[REDUCE, replace(REDUCE, kind="all-gather", branch="1")]),
        compiled("outcome"),
    )


@pytest.fixture(scope="module")
def kind() -> ModelKind:
    return read_model_kind(embedded_model())


def read(run: DryRun) -> dict[str, Any]:
    return json.loads(document(run))


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
    run, text = fitting(kind), terminal(fitting(kind))
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
        "chip-hours",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_assumptions_are_written_out(kind: ModelKind) -> None:
    text = " ".join(terminal(fitting(kind)).split())
    for line in ASSUMPTIONS:
        assert line in text


def test_a_program_that_compiles_but_does_not_fit(kind: ModelKind) -> None:
    large = Memory(14 * GIB, GIB, 0, 2 * GIB, round(15.75 * GIB))
    run = result_of(kind, compiled("embed"), compiled("layers", layers=28, memory=large), compiled("outcome"))
    text = terminal(run)
    assert not run.fits
    assert "17.00  DOES NOT FIT" in text
    assert "compute.state_memory_gb: lower it by 1.3 or more" in text


def test_a_program_that_the_compiler_refuses(kind: ModelKind) -> None:
    run = result_of(kind, refusal(spec("layers"), OOM, 1.0))
    text = terminal(run)
    assert "20.50  DOES NOT FIT" in text
    assert "No estimate" in text
    for field in ("compute.dtype: bfloat16", "compute.batch_size: below 4", "compute.visual_slots"):
        assert field in text
    assert read(run)["programs"][0]["needed_bytes"] == round(20.5 * GIB)


def test_images_that_do_not_fit(kind: ModelKind) -> None:
    text = terminal(result_of(kind, refusal(spec("encode"), OOM, 1.0)))
    assert "compute.patch_slots" in text
    assert "compute.visual_slots" not in text


def test_another_reason_than_memory(kind: ModelKind) -> None:
    text = terminal(result_of(kind, refusal(spec("layers"), "INTERNAL: Mosaic failed\nmore", 1.0)))
    assert "NOT COMPILED" in text
    assert "INTERNAL: Mosaic failed" in text
    assert "for another reason than memory" in text
