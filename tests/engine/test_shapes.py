"""The shapes of a run, configured or chosen, and samples that fit into none."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.config import ComputeConfig, RunConfig
from rlens_jax.data.samples import Sample
from rlens_jax.engine.buckets import Size
from rlens_jax.engine.choices import described, with_dtype
from rlens_jax.engine.preparing import Images, PreparedSplit, RowSizes, SampleSizes
from rlens_jax.engine.shapes import Block, blocks_of, check_context, choose_shapes, dealt_rows, row_buckets, row_padding
from rlens_jax.engine.trunks import Row
from rlens_jax.errors import UserError
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import ImageSize, Places
from tests.engine.toy import ToyPreparer

KIND = read_model_kind("embedded")
CONTEXT = KIND.config.decoder.context


def split(rows: Sequence[Size], images: Sequence[ImageSize] = ((512,),)) -> PreparedSplit:
    """Samples s0, s1, ... with one row each, all with the same images."""
    numbers = range(len(rows))
    samples = tuple(Sample(f"s{number}", "d", (), "?", ("!",)) for number in numbers)
    row_sizes = tuple(RowSizes((number,), *row, answers=2, leading_text=3) for number, row in zip(numbers, rows, strict=True))
    sizes = tuple(SampleSizes(row, row[0]) for row in rows)
    image_sizes = dict.fromkeys(numbers, tuple(images))
    return PreparedSplit(samples, np.arange(len(rows)), row_sizes, sizes, image_sizes, Images(samples, ToyPreparer()), no_row)


def no_row(number: int) -> Row:
    raise NotImplementedError


def test_configured_slots_win_and_only_used_ones_are_kept() -> None:
    compute = ComputeConfig(batch_size=4, text_slots=(16, 32, 64), visual_slots=(128, 256), patch_slots=(256, 512, 1024))
    shapes = choose_shapes(compute, KIND, [split([(10, 100), (40, 100)]), split([(40, 128)])])
    assert shapes.rows == (Bucket(16, 128), Bucket(64, 128))
    assert shapes.images == ((512,),)
    assert (shapes.batch_size, shapes.largest) == (4, Bucket(64, 128))


def test_open_slots_are_chosen_around_configured_ones() -> None:
    shapes = choose_shapes(ComputeConfig(text_slots=(16, 48), max_buckets=2), KIND, [split([(10, 99), (40, 60), (12, 31)])])
    assert len(shapes.rows) <= 2
    assert {bucket.text for bucket in shapes.rows} <= {16, 48}
    assert choose_shapes(ComputeConfig(), KIND, [split([(10, 99)])]).rows == (Bucket(10, 99),)


def test_the_smallest_bucket_holds_a_row_and_a_larger_image_has_its_own() -> None:
    shapes = choose_shapes(ComputeConfig(), KIND, [split([(10, 100)])])
    assert shapes.row((3, 50)) == Bucket(10, 100)
    assert shapes.image((400,)) == (512,)
    assert shapes.image((513,)) == (513,)
    assert [bucket.slots for bucket in row_buckets((1, 2), (10, 20))] == [11, 21, 12, 22]


def refused(compute: ComputeConfig, *splits: PreparedSplit) -> str:
    with pytest.raises(UserError) as raised:
        choose_shapes(compute, KIND, splits)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_all_samples_that_are_too_long_are_named_at_once() -> None:
    message = refused(ComputeConfig(), split([(CONTEXT, number) for number in range(14)]), split([(5, 5)]))
    assert message.startswith(f"13 of 15 samples have too many tokens: the model's context is {CONTEXT} (s1: {CONTEXT + 1}, s2:")
    assert f"s10: {CONTEXT + 10} and 3 more); leave them out" in message
    assert "s11" not in message
    with pytest.raises(UserError, match=rf"1 of 2 .* with 3 new ones is {CONTEXT} \(s1: {CONTEXT - 2}\); lower it"):
        check_context([split([(CONTEXT - 3, 0), (CONTEXT - 2, 0)])], CONTEXT, 3, "lower it")


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (
            ComputeConfig(text_slots=(8,)),
            r"2 of 3 .* text tokens; the largest bucket has 8 \(s1: 9, s2: 20\); .*compute.text_slots",
        ),
        (
            ComputeConfig(visual_slots=(16, 32)),
            r"1 of 3 .* visual tokens; .* 32 \(s2: 64\); add a larger one to compute.visual_slots",
        ),
        (ComputeConfig(patch_slots=(256,)), r"3 of 3 .* patches of an image; .* 256 \(s0: 512, .*compute.patch_slots"),
    ],
)
def test_samples_that_fit_no_configured_bucket_are_named_at_once(compute: ComputeConfig, expected: str) -> None:
    message = refused(compute, split([(8, 16), (9, 32), (20, 64)]))
    assert re.search(expected, message), message


def test_rows_are_dealt_to_groups_and_cut_into_full_blocks() -> None:
    small, large = split([(10, 100)] * 37 + [(10, 200)] * 4), split([(10, 100)] * 12)
    shapes = replace(choose_shapes(ComputeConfig(), KIND, [small, large]), batch_size=4)
    assert shapes.rows == (Bucket(10, 100), Bucket(10, 200))
    dealt = [dealt_rows(each, shapes, groups=2) for each in (small, large)]
    for one, prepared in zip(dealt, (small, large), strict=True):
        numbers = [number for groups in one.values() for group in groups for number in group]
        assert sorted(numbers) == list(range(len(prepared.rows)))
        assert all(max(map(len, groups)) - min(map(len, groups)) <= 1 for groups in one.values())
    # 4 x 210 slots are at most 7 rows of 110; 19 rows of the fuller group are three blocks of them.
    even = blocks_of(zip((small, large), dealt, strict=True), shapes, even=True)
    assert even == {Bucket(10, 100): Block(7, Places(1, 2, 8)), Bucket(10, 200): Block(2, Places(1, 2, 8))}
    alike = blocks_of(zip((small, large), dealt, strict=True), shapes, even=False)
    assert [block.rows for block in alike.values()] == [4, 2]


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16"), ("gpu", "bfloat16")])
def test_a_run_says_what_it_chose_and_why(platform: str, dtype: str) -> None:
    given = RunConfig(model="FOLDER")
    splits = [split([(10, 100), (10, 300)])]
    config = with_dtype(given, platform)
    shapes = choose_shapes(config.compute, KIND, splits)
    assert row_padding(shapes, splits) == 0
    assert described(given, config, shapes, splits).splitlines() == [
        "settings for FOLDER:",
        "  reduction: R = 256, 20 % of the FFN units, 10 % of the visual tokens as probes (as in the paper)",
        f"  dtype: {dtype} (by the device)",
        "  text + visual slots: 10 + 100, 10 + 300 (chosen from the samples; 0.0% padding)",
        "  image sizes: 512 (chosen from the samples; 0.0% padding)",
    ]
    assert f"dtype: {dtype} (configured)" in described(config, config, shapes, splits)
