import pytest

from rlens_jax.dry_run.costs import LAYER_KINDS, Branch, Collective, Cost, ProgramCost
from rlens_jax.dry_run.estimate import (
    LIKELY_SHARE,
    Links,
    ProgramTime,
    Times,
    estimate,
    program_time,
    program_times,
    roofline_seconds,
)
from rlens_jax.dry_run.hlo import Shape
from rlens_jax.dry_run.topology import find_slice, ring_rate
from rlens_jax.dry_run.workload import BucketLoad, Phase, SplitLoad, Workload
from rlens_jax.layout import Bucket
from tests.dry_run.programs import compiled
from tests.sharding.test_mesh import Chip

WHERE = find_slice("v5e:4x4")
LINKS = Links(model=50e9, other=100e9)
REDUCE = Collective("all-reduce", (Shape("f32", (1000,)),), (Shape("f32", (1000,)),), "model", 4, True, (), 28)
SECOND = WHERE.flops


def test_the_longer_of_arithmetic_and_traffic() -> None:
    assert roofline_seconds(Cost(197e12, 1), WHERE) == pytest.approx(1)
    assert roofline_seconds(Cost(1, 819e9), WHERE) == pytest.approx(1)


def test_links_of_a_square_a_line_and_a_rectangle() -> None:
    chips = {chip.coords: chip for chip in map(Chip, range(16))}

    def rate(*places: tuple[int, int]) -> float:
        return ring_rate(WHERE, [chips[place] for place in places])

    square = rate((0, 0), (1, 0), (0, 1), (1, 1))
    assert square == rate(*((x, y) for x in range(4) for y in range(2))) == 100e9
    # A line of four is a third slower; two chips have one link in each direction.
    assert square / rate(*((x, 0) for x in range(4))) == pytest.approx(4 / 3)
    assert rate((2, 1), (3, 1)) == 50e9


def test_a_program_is_its_layers_and_the_rest() -> None:
    cost = ProgramCost(Cost(30e12, 0), Cost(1e12, 0))
    time = program_time(compiled("layers", layers=28, dense=cost, collectives=(REDUCE,)), WHERE, LINKS)
    sent = 2 * 3 / 4 * 4000 / 50e9
    assert time.layer["dense"] == pytest.approx(1e12 / 197e12 + sent)
    assert time.fixed == pytest.approx(2e12 / 197e12)
    assert time.run == pytest.approx(30e12 / 197e12 + 28 * sent)


def test_collectives_run_in_layers_of_their_kind_only() -> None:
    reduced = Collective(**{**vars(REDUCE), "branches": (Branch("ffn", 1),)})
    cost = ProgramCost(Cost(28, 0), Cost(1, 0))
    with_it, without = (
        program_time(compiled("layers", layers=28, dense=cost, collectives=items), WHERE, LINKS) for items in ((reduced,), ())
    )
    assert with_it.run == without.run
    assert [with_it.layer[kind] > without.layer[kind] for kind in LAYER_KINDS] == [False, False, True, True]


def test_layers_of_a_program_without_a_loop() -> None:
    time = program_time(compiled("embed", dense=ProgramCost(Cost(SECOND), None)), WHERE, LINKS)
    assert time == ProgramTime(1.0, dict.fromkeys(LAYER_KINDS, 0.0), 0, 96)


def times(*programs: object) -> Times:
    found = program_times(programs, WHERE, LINKS, 40.0)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_a_run() -> None:
    known = times(
        compiled("encode", "patches 10", slots=20, dense=ProgramCost(Cost(2 * SECOND), None)),
        compiled("embed", dense=ProgramCost(Cost(5 * SECOND), None)),
        compiled(
            "layers",
            layers=4,
            dense=ProgramCost(Cost(47 * SECOND), Cost(10 * SECOND)),
            reduced=ProgramCost(Cost(7 * SECOND), Cost(SECOND)),
        ),
        compiled("last layer", dense=ProgramCost(Cost(13 * SECOND), None)),
        compiled("outcome", dense=ProgramCost(Cost(11 * SECOND), None)),
    )
    search = Phase("search", "validation", steps=3, state_runs=4, embeddings=2)
    search.layers |= {"dense": 6, "ffn": 3}
    search.state_layers["dense"] = 4
    # Three blocks of the compiled bucket, and one of a bucket with twice the slots
    loads = (BucketLoad(Bucket(32, 64), 6, 400, 1, 3), BucketLoad(Bucket(64, 128), 2, 300, 1, 1))
    split = SplitLoad(8, 8, loads, {(10,): 4, (40,): 1})
    found = estimate(Workload((search,), {"validation": split}, 2, 2, 0), known, chips=16)
    block = 2 * 5 + (3 + 4) * 7 + (6 + 4) * 10 + 3 * 1 + 3 * (13 + 11)
    assert found.phases["search"] == pytest.approx({"text 32, visual 64": 3 * block, "text 64, visual 128": 2 * block})
    # Two runs with two images of ten patches, and one with places for two of forty
    assert found.phases["vision"] == pytest.approx({"patches 10": 4.0, "patches 40": 8.0})
    # Four programs in two buckets and one in two others; five took 40 seconds, 1.5 of each for its trace.
    compilation = 10 * 1.5 + (8 - 1.5)
    assert found.compilation == pytest.approx(compilation)
    assert found.roofline == pytest.approx(5 * block + 12)
    assert found.likely == pytest.approx(found.roofline / LIKELY_SHARE + compilation)


def test_generation_runs_one_program_a_step() -> None:
    known = times(compiled("generate", layers=4, dense=ProgramCost(Cost(SECOND), None)))
    split = SplitLoad(2, 2, (BucketLoad(Bucket(32, 64), 2, 100, 1, 1),), {})
    found = estimate(Workload((Phase("search", "validation", steps=3),), {"validation": split}, 2, 2, 0), known, chips=16)
    assert found.phases == {"vision": {}, "search": pytest.approx({"text 32, visual 64": 3.0})}
