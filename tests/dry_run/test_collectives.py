import pytest

from rlens_jax.dry_run.costs import LAYER_KINDS, Collective, bytes_sent, find_collectives, mesh_axis, program_cost
from rlens_jax.dry_run.hlo import Loops, Shape, device_groups, parse_instruction, parse_module
from tests.dry_run.snippets import LOOP

MESH = (2, 4)


def groups(attributes: str, devices: int = 8) -> list[tuple[int, ...]]:
    return device_groups(parse_instruction(f"  %a = f32[] all-reduce(%b), channel_id=1, {attributes}"), devices)


def collectives(mesh: tuple[int, int] = MESH) -> list[Collective]:
    module = parse_module(LOOP)
    return find_collectives(module, Loops(module, 5), mesh)


def test_kinds_sizes_axes_and_places() -> None:
    reduce, gather = collectives()
    states, scores = Shape("bf16", (2, 16, 64)), Shape("f32", (2, 8), in_hbm=False)
    assert (reduce.kind, reduce.shapes, reduce.axis, reduce.group_size) == ("all-reduce", (states,), "model", 4)
    assert (reduce.in_layer_loop, str(*reduce.branches), reduce.times) == (True, "0", 5)
    assert (gather.kind, gather.shapes, gather.axis) == ("all-gather", (scores,), "model")
    assert (gather.in_layer_loop, str(*gather.branches), gather.times) == (True, "1", 5)
    assert (reduce.bytes, gather.bytes) == (4096, 256)


def test_bytes_around_a_ring() -> None:
    reduce, gather = collectives()
    assert reduce.link_bytes == 2 * 3 / 4 * 4096
    assert gather.link_bytes == 3 / 4 * 256
    assert bytes_sent([reduce, gather], "dense") == 5 * 6144.0
    assert bytes_sent([reduce, gather], "both") == 5 * 192.0


def test_a_conditional_reduces_the_operator_that_its_scope_names() -> None:
    text = LOOP.replace(
        "branch_computations={%dense, %reduced}",
        'branch_computations={%dense, %reduced}, metadata={op_name="jit(f)/while/body/ffn/cond"}',
    )
    module = parse_module(text)
    found = find_collectives(module, Loops(module, 5), MESH)
    assert [[item.runs(kind) for kind in LAYER_KINDS] for item in found] == [
        [True, True, False, False],
        [False, False, True, True],
    ]
    flops = {kind: cost.flops for kind in LAYER_KINDS if (cost := program_cost(module, Loops(module, 5), kind).layer)}
    assert flops["dense"] == flops["attention"] < flops["ffn"] == flops["both"]


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%r", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[2,4]<=[8], to_apply=%r", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%r", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups={}, to_apply=%r", [tuple(range(8))]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}, to_apply=%r", [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, to_apply=%r", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=mesh['a'=4,'c'=2] {'c'}, dimensions={0}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (
            "replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'b','a'}, to_apply=%r",
            [(0, 1), (2, 3), (4, 5), (6, 7)],
        ),
        ("to_apply=%r", [tuple(range(8))]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
    ],
)
def test_notations_of_groups(attributes: str, expected: list[tuple[int, ...]]) -> None:
    assert groups(attributes) == expected


def test_an_unknown_notation_is_no_guess() -> None:
    with pytest.raises(ValueError, match="unknown notation"):
        groups("replica_groups=@mesh{axis}, to_apply=%r")


@pytest.mark.parametrize(
    ("members", "axis"),
    [
        ([(0, 1, 2, 3), (4, 5, 6, 7)], "model"),
        ([(0, 1), (2, 3)], "model"),
        ([(0, 4), (1, 5), (2, 6), (3, 7)], "work"),
        ([tuple(range(8))], "work and model"),
        ([(0, 1), (0, 4)], "work and model"),
        ([(0,), (1,)], None),
    ],
)
def test_mesh_axes(members: list[tuple[int, ...]], axis: str | None) -> None:
    assert mesh_axis(members, MESH) == axis


def test_groups_of_one_device_exchange_nothing() -> None:
    text = LOOP.replace("{{0,1,2,3},{4,5,6,7}}", "{{0},{1},{2},{3},{4},{5},{6},{7}}")
    module = parse_module(text)
    assert [item.kind for item in find_collectives(module, Loops(module, 5), MESH)] == ["all-gather"]


def test_asynchronous_collectives_are_counted_once() -> None:
    text = """ENTRY %main (a: f32[4]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = f32[16]{0} all-gather-done(%start)
}
"""
    module = parse_module(text)
    (item,) = find_collectives(module, Loops(module, 1), MESH)
    assert (item.kind, item.shapes, item.bytes, item.in_layer_loop) == ("all-gather", (Shape("f32", (4,)),), 64, False)


SPLIT = """%begin (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  %gather.1 = f32[16]{0} all-gather(%p), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %c = f32[16]{0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (q: f32[4]) -> f32[16] {
  %q = f32[4]{0} parameter(0)
  ROOT %gather.2 = f32[16]{0} all-gather(%q), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

ENTRY %main (a: f32[4]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %start = f32[16]{0} fusion(%a), kind=kCustom, calls=%begin
  ROOT %also = f32[16]{0} fusion(%a), kind=kOutput, calls=%beside
}
"""  # noqa: E501


@pytest.mark.parametrize("text", [SPLIT, SPLIT.replace("AsyncCollectiveStart", "Other")])
def test_a_collective_that_is_spread_over_fusions_is_counted_once(text: str) -> None:
    module = parse_module(text)
    assert len(find_collectives(module, Loops(module, 1), MESH)) == 1
