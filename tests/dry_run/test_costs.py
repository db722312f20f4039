import pytest

from rlens_jax.dry_run.costs import Cost, LayerKind, flops, fusion_bytes, instruction_bytes, program_cost
from rlens_jax.dry_run.hlo import Loops, Module, parse_module
from tests.dry_run.snippets import LOOP, NESTED, TOWER_KERNEL

PRODUCT = 2 * (2 * 16) * 64 * 32
STATES = 2 * 16 * 64 * 2
"""Bytes of bf16[2,16,64]."""
LAYER = 64 * 32 * 2
"""Bytes of one layer's weights."""


def costs(module: Module, kind: LayerKind, layers: int = 1, steps: int = 1):
    return program_cost(module, Loops(module, layers, steps), kind)


def one(lines: str, name: str):
    """A computation of the given instructions, and one of them."""
    module = parse_module(f"ENTRY %main (a: f32[]) -> f32[] {{\n{lines}\n}}\n")
    return module.entry.instructions[name], module.entry


def test_a_dense_layer() -> None:
    # The product's result and the flag are on chip; the sum reads and writes the states.
    cost = costs(parse_module(LOOP), "dense").layer
    assert cost == Cost(PRODUCT, STATES + LAYER + 4 + 2 * STATES)


def test_a_reduced_layer_counts_what_its_kernel_declares() -> None:
    cost = costs(parse_module(LOOP), "both").layer
    assert cost == Cost(PRODUCT + 1000, STATES + LAYER + 4 + 500 + 2 * STATES)


def test_the_kernel_of_towers_counts_the_keys_that_it_fetches_for_each_block_of_queries() -> None:
    queries, keys, segments = 2 * 384 * 80 * 2, 2 * 512 * 80 * 2, 8 * 512 * 4
    visited = 3 * 2 * 128 / 512
    # Four times: the kernel's queries and its result, and the copy of this.
    traffic = 4 * queries + visited * (2 * keys + 2 * segments)
    assert costs(parse_module(TOWER_KERNEL), "dense").total == Cost(4 * 2 * 384 * 2 * 128 * 80, traffic)


def test_trip_counts_are_multiplied_in_and_a_copy_to_the_chip_is_read_once() -> None:
    once, thrice = (costs(parse_module(LOOP), "dense", layers=layers) for layers in (1, 3))
    assert once.layer == thrice.layer is not None
    assert thrice.total == once.layer.times(3) + Cost(0, STATES)


def test_nested_loops() -> None:
    cost = costs(parse_module(NESTED), "dense", layers=5, steps=7)
    dot = 2 * 4**3
    assert cost.layer is not None
    assert cost.layer.flops == 2 * dot  # the loop of unknown length inside a layer runs once
    assert cost.total.flops == 7 * 5 * 2 * dot


def test_a_loop_of_known_length_that_is_not_the_layers() -> None:
    cost = costs(parse_module(NESTED), "dense", layers=3, steps=7)
    # Without a loop of 3, the outermost one of unknown length is the loop over layers.
    assert cost.total.flops == 3 * 5 * 2 * 2 * 4**3


CONVOLUTIONS = {
    # batch, feature and contracted sizes: a plain product
    "plain": ("f32[6,8]", "f32[8,4]", "f32[6,4]", "", "bf_io->bf", 2 * 6 * 8 * 4),
    # XLA's batched product on TPU: each of 3 batch places meets its own weights only
    "batched": ("f32[3,5,8]", "f32[3,8,4]", "f32[3,5,4]", "window={size=3 lhs_dilate=3}, ", "0bf_0io->0bf", 2 * 3 * 5 * 8 * 4),
    # a 3x3 window with a border of one: the corners meet 4 of 9 places
    "padded": (
        "f32[1,2,2,1]", "f32[3,3,1,1]", "f32[1,2,2,1]", "window={size=3x3 pad=1_1x1_1}, ", "b01f_01io->b01f", 2 * 16,
    ),
    "strided": ("f32[1,8,3]", "f32[2,3,5]", "f32[1,4,5]", "window={size=2 stride=2}, ", "b0f_0io->b0f", 2 * 4 * 2 * 3 * 5),
    "spread": ("f32[1,5,1]", "f32[2,1,1]", "f32[1,3,1]", "window={size=2 rhs_dilate=2}, ", "b0f_0io->b0f", 2 * 3 * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_count_products_of_numbers_that_are_there(name: str) -> None:
    left, right, result, window, labels, expected = CONVOLUTIONS[name]
    item, computation = one(
        f"  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
        f"  ROOT %c = {result} convolution(%a, %b), {window}dim_labels={labels}",
        "c",
    )
    assert flops(item, computation) == expected


def test_a_batched_dot() -> None:
    item, computation = one(
        "  %a = f32[3,5,8]{2,1,0} parameter(0)\n  %b = f32[3,4,8]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[3,5,4]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={2}",
        "c",
    )
    assert flops(item, computation) == 2 * 3 * 5 * 4 * 8


IN_PLACE = """
%write (p: f32[9,4], q: f32[1,4], r: s32[]) -> f32[9,4] {
  %p = f32[9,4]{1,0} parameter(0)
  %q = f32[1,4]{1,0} parameter(1)
  %r = s32[] parameter(2)
  ROOT %u = f32[9,4]{1,0} dynamic-update-slice(%p, %q, %r, %r)
}

ENTRY %main (a: f32[9,4], b: f32[1,4], i: s32[]) -> f32[9,4] {
  %a = f32[9,4]{1,0} parameter(0)
  %b = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[9,4]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%write
}
"""


def test_an_update_in_place_moves_only_the_update() -> None:
    module = parse_module(IN_PLACE)
    assert fusion_bytes(module.entry.root, module.entry, module.computations) == 16 + 4 + 16


def test_gathered_rows_and_slices() -> None:
    lines = (
        "  %t = f32[100,8]{1,0} parameter(0)\n  %i = s32[3,1]{1,0} parameter(1)\n"
        "  %g = f32[3,8]{1,0} gather(%t, %i), offset_dims={1}\n"
        "  ROOT %s = f32[2,8]{1,0} slice(%t), slice={[0:2], [0:8]}"
    )
    module = parse_module(f"ENTRY %main (a: f32[]) -> f32[] {{\n{lines}\n}}\n")
    assert costs(module, "dense").total.bytes == (96 + 96 + 12) + (64 + 64)


def test_a_loop_in_a_layer_may_have_as_many_trips_as_there_are_layers() -> None:
    # One step: nothing is around the layers, so the outermost loop of unknown length is over them.
    cost = costs(parse_module(NESTED), "dense", layers=5)
    assert cost.layer is not None
    assert cost.total.flops == 5 * cost.layer.flops == 5 * 5 * 2 * 2 * 4**3


def test_a_slice_that_is_fetched_ahead_is_read_once() -> None:
    lines = (
        "  %t = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)\n"
        "  %s = ((bf16[64,128]{1,0:T(8,128)(2,1)}), bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%t),"
        " slice={[0:16], [0:128]}\n"
        "  ROOT %d = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)"
    )
    started, computation = one(lines, "s")
    assert instruction_bytes(started, computation) == 16 * 128 * 2
    assert instruction_bytes(computation.root, computation) == 0
