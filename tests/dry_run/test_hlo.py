import pytest

from rlens_jax.dry_run.hlo import Shape, element_bits, parse_instruction, parse_module, parse_shapes
from tests.dry_run.snippets import LOOP, TOWER_KERNEL


def test_computations_and_entry() -> None:
    module = parse_module(LOOP)
    assert module.entry.name == "main"
    assert set(module.computations) == {
        "region_add", "take_layer", "multiply", "dense", "reduced", "body", "condition", "main",
    }  # fmt: skip
    assert [item.opcode for item in module.entry][-2:] == ["while", "get-tuple-element"]
    assert module.entry.root.name == "gte.9"
    assert {number: item.name for number, item in module.entry.parameters.items()} == {
        0: "w.1", 1: "x.1", 2: "n.1", 3: "f.1",
    }  # fmt: skip


def test_a_tuple_type_with_tiles_comments_and_memory_spaces() -> None:
    kind = "(s32[]{:T(128)}, bf16[2,16,64]{2,1,0:T(8,128)(2,1)S(1)}, /*index=5*/pred[28]{0:T(512)(128)(4,1)}, u32[]{:S(2)})"
    assert parse_shapes(kind) == (
        Shape("s32", ()),
        Shape("bf16", (2, 16, 64), in_hbm=False),
        Shape("pred", (28,)),
        Shape("u32", (), in_hbm=False),
    )


@pytest.mark.parametrize(
    ("dtype", "bits"), [("pred", 8), ("bf16", 16), ("f32", 32), ("s4", 4), ("f8e4m3fn", 8), ("c64", 64), ("token", 0)]
)
def test_element_bits(dtype: str, bits: int) -> None:
    assert element_bits(dtype) == bits


def test_parentheses_and_quotes_inside_of_attributes() -> None:
    item = parse_module(LOOP).computations["reduced"].instructions["scores"]
    assert item.opcode == "custom-call"
    assert item.operands == ("gte.2",)
    assert item.attribute("custom_call_target") == '"tpu_custom_call"'


def test_lines_of_metadata_belong_to_their_instruction() -> None:
    """They begin with a brace, as the end of a computation does."""
    entry = parse_module(TOWER_KERNEL).entry
    assert list(entry.instructions) == ["m", "w", "q", "k", "a", "s", "kernel", "out", "copy.1"]
    assert entry.root.opcode == "copy"
    assert "/tower_attention/" in entry.instructions["kernel"].attributes


def test_what_an_instruction_calls() -> None:
    module = parse_module(LOOP)
    loop = module.entry.instructions["while.1"]
    assert dict(loop.called) == {"condition": "condition", "body": "body"}
    assert module.computations["body"].instructions["conditional.1"].branches == ("dense", "reduced")


def test_older_spelling_of_a_conditional() -> None:
    line = "  %c = f32[] conditional(%p, %a, %b), true_computation=%yes, false_computation=%no"
    assert parse_instruction(line).branches == ("no", "yes")


def test_users() -> None:
    body = parse_module(LOOP).computations["body"]
    assert [item.name for item in body.users["x"]] == ["fusion.1", "tuple.1"]


def test_a_constant_reads_nothing_and_bytes_round_up() -> None:
    item = parse_instruction('  ROOT %c.1 = s4[3]{0} constant({1, 2, 3}), metadata={op_name="%x"}')
    assert item.is_root
    assert item.operands == ()
    assert item.shapes[0].bytes == 2


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_module("HloModule nothing\n")
    with pytest.raises(ValueError, match="no HLO instruction"):
        parse_instruction("ENTRY %main {")
