import pytest

from rlens_jax.dry_run.costs import Collective, Cost, ProgramCost
from rlens_jax.dry_run.dry_run import ProgramTime, estimates, program_time, roofline_seconds
from rlens_jax.dry_run.hlo import Shape
from rlens_jax.dry_run.topology import find_slice
from rlens_jax.dry_run.workload import Phase
from tests.dry_run.programs import compiled

WHERE = find_slice("v5e:4x4")
REDUCE = Collective("all-reduce", (Shape("f32", (1000,)),), (Shape("f32", (1000,)),), "model", 4, True, "", 28)


def test_the_longer_of_arithmetic_and_traffic_and_then_the_interconnect() -> None:
    assert roofline_seconds(Cost(197e12, 1), 0, WHERE) == pytest.approx(1)
    assert roofline_seconds(Cost(1, 819e9), 0, WHERE) == pytest.approx(1)
    assert roofline_seconds(Cost(197e12, 819e9), 100e9, WHERE) == pytest.approx(2)


def test_a_program_is_its_layers_and_the_rest() -> None:
    cost = ProgramCost(Cost(30e12, 0), Cost(1e12, 0))
    time = program_time(compiled("layers", layers=28, dense=cost, collectives=(REDUCE,)), WHERE)
    sent = 2 * 3 / 4 * 4000 / 100e9
    assert time.layer == pytest.approx(1e12 / 197e12 + sent)
    assert time.fixed == pytest.approx(2e12 / 197e12)
    assert time.run == pytest.approx(30e12 / 197e12 + 28 * sent)


def test_collectives_of_reduced_layers_are_not_those_of_dense_ones() -> None:
    reduced = Collective(**{**vars(REDUCE), "branch": "1"})
    cost = ProgramCost(Cost(28, 0), Cost(1, 0))
    with_it, without = (
        program_time(compiled("layers", layers=28, dense=cost, collectives=items), WHERE) for items in ((reduced,), ())
    )
    assert with_it == without


def test_a_run() -> None:
    second = 197e12
    programs = [
        compiled("encode", "patches 10", dense=ProgramCost(Cost(1 * second), None)),
        compiled("encode", "patches 20", dense=ProgramCost(Cost(3 * second), None)),
        compiled("embed", dense=ProgramCost(Cost(5 * second), None)),
        compiled("layers", layers=4, dense=ProgramCost(Cost(47 * second), Cost(10 * second))),
        compiled("outcome", dense=ProgramCost(Cost(11 * second), None)),
    ]
    phases = [Phase("vision", images=16), Phase("search", steps=3, layer_steps=9, states_made=4, embeddings=2)]
    (found,) = estimates(programs, phases, WHERE)
    assert found.seconds == pytest.approx({"vision": 6.0, "search": 2 * 5 + (3 + 4) * 7 + 9 * 10 + 3 * 11})
    assert found.chip_hours == pytest.approx(found.total / 3600 * 16)


def test_generation_runs_one_program_a_step() -> None:
    programs = [compiled("generate", layers=4, dense=ProgramCost(Cost(197e12), None))]
    (found,) = estimates(programs, [Phase("search", steps=3)], WHERE)
    assert found.seconds == pytest.approx({"search": 3.0})


def test_layers_of_a_program_without_a_loop() -> None:
    assert program_time(compiled("embed", dense=ProgramCost(Cost(197e12), None)), WHERE) == ProgramTime(1.0, 0.0, 0)
