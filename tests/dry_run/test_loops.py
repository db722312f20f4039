"""Trip counts as they stand in the text of a program for a TPU, which does not print them."""

import pytest

from rlens_jax.dry_run.hlo import Loops, Module, known_trips, parse_module

PARTS = """HloModule jit_parts

%body (p: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(256)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4]{0:T(256)} get-tuple-element(%p), index=1
  %n = s32[]{:T(128)} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, f32[4]{0:T(256)}, s32[]{:T(128)}) tuple(%next, %x, %n)
}

%condition (q: (s32[], f32[4], s32[])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[4]{0:T(256)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %m = s32[]{:T(128)} LAST
  ROOT %more = pred[]{:T(512)} compare(%j, %m), direction=DIRECTION
}

ENTRY %main (a: f32[4], k: s32[]) -> (s32[], f32[4], s32[]) {
  %a = f32[4]{0:T(256)} parameter(0)
  %k = s32[]{:T(128)} parameter(1)
  %two = s32[]{:T(128)} constant(2)
  %nine = s32[]{:T(128)} constant(9)
  %first = s32[]{:T(128)} copy(%two)
  %given = (s32[]{:T(128)}, f32[4]{0:T(256)}, s32[]{:T(128)}) tuple(FIRST, %a, GIVEN)
  ROOT %loop = (s32[]{:T(128)}, f32[4]{0:T(256)}, s32[]{:T(128)}) while(%given), condition=%condition, body=%body
}
"""


def parts(first: str, last: str, given: str = "%k", direction: str = "LT") -> Module:
    text = PARTS.replace("FIRST", first).replace("LAST", last).replace("GIVEN", given)
    return parse_module(text.replace("DIRECTION", direction))


@pytest.mark.parametrize(
    ("module", "trips"),
    [
        (parts("%two", "constant(8)"), 6),
        (parts("%first", "constant(8)"), 6),
        (parts("%two", "get-tuple-element(%q), index=2", given="%nine"), 7),
        (parts("%two", "get-tuple-element(%q), index=2"), None),  # how many, is data
        (parts("%k", "constant(8)"), None),  # where it begins, is data
        (parts("%two", "constant(8)", direction="NE"), None),
    ],
)
def test_the_trip_count_of_a_counted_loop(module: Module, trips: int | None) -> None:
    assert known_trips(module) == {"loop": trips}
    loops = Loops(module, layers=28)
    loop = module.entry.instructions["loop"]
    assert loops.trips(loop, inside_layer=True) == (trips or 1)
    assert loops.trips(loop, inside_layer=False) == (trips or 28)
