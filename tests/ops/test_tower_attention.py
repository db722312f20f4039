"""Attention in towers, in chunks and by the TPU's kernel (in Pallas' interpreters), against all scores at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.ops.attention import masked_attention
from rlens_jax.ops.tower_attention import WHOLE, attend_groups, attend_in_chunks, cudnn_tower_attention, splash_tower_attention
from rlens_jax.sharding.mesh import make_mesh, split_over
from rlens_jax.sharding.model_axis import WORK, split_heads
from tests.numerics import assert_close

MOST = 29


def images(*counts: int) -> np.ndarray:
    """Group numbers of images with so many patches, padded to the largest."""
    return (np.arange(max(counts))[None] >= np.array(counts)[:, None]).astype(np.int32)


def windows(*counts: int) -> np.ndarray:
    """The same with windows of 1 to MOST patches, whose numbers have gaps, before the padding's number."""
    rng, rows = np.random.default_rng(0), np.full((len(counts), max(counts)), np.iinfo(np.int32).max, np.int32)
    for row, count in zip(rows, counts, strict=True):
        sizes = rng.integers(1, MOST + 1, count)
        sizes[1] = MOST
        row[:count] = np.repeat(3 * np.arange(count), sizes)[:count]
    return rows


CASES = {
    "one image": (images(257), None, 80),
    "ragged images": (images(389, 131, 1), None, 8),
    "an empty place": (images(131, 0), None, 8),
    "windows": (windows(523, 389, 64), MOST, 8),
}
"""Group numbers, the most in a window, and the head size. Blocks have 128 patches; most sizes are primes."""
WAYS = {"chunks": partial(attend_in_chunks, queries=128), "splash": partial(splash_tower_attention, block=128, interpret=True)}


def heads(group: np.ndarray, size: int, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((len(group), 3, group.shape[1], size)), jnp.float32) for _ in range(3)]


def plain(q: jax.Array, k: jax.Array, v: jax.Array, group: np.ndarray) -> jax.Array:
    return masked_attention(q, k, v, jnp.asarray(group[:, :, None] == group[:, None]))


@pytest.mark.parametrize(
    ("way", "case"),
    [*((way, case) for way in WAYS for case in CASES), *(("cudnn", case) for case in CASES if CASES[case][1] is None)],
)
def test_patches_attend_to_their_group(way: str, case: str) -> None:
    group, most, size = CASES[case]
    q, k, v = heads(group, size)
    attend = cudnn_tower_attention if way == "cudnn" else partial(WAYS[way], most=most)
    ours = np.asarray(jax.jit(attend)(q, k, v, jnp.asarray(group)))
    assert np.isfinite(ours).all()
    real = np.broadcast_to((group < group.max(axis=1, keepdims=True) if group.any() else group == 0)[:, None, :, None], q.shape)
    assert_close(ours[real], np.asarray(plain(q, k, v, group))[real], 1e-5)


@pytest.mark.parametrize("case", ["ragged images", "windows"])
def test_the_kernel_never_reads_padding(case: str) -> None:
    """Real patches have the same bits whatever finite numbers padding holds."""
    group, most, size = CASES[case]
    padding = (group == group.max())[:, None, :, None]
    run = jax.jit(partial(WAYS["splash"], most=most))
    clean, dirty = (run(*(jnp.where(padding, fill, x) for x in heads(group, size)), jnp.asarray(group)) for fill in (0.0, 1e15))
    np.testing.assert_array_equal(jnp.where(padding, 0, dirty), jnp.where(padding, 0, clean))


def test_the_interpreter_of_tpu_memory_agrees() -> None:
    group = images(131)
    q, k, v = (x[:, :1] for x in heads(group, 72))
    with pltpu.force_tpu_interpret_mode():
        ours = jax.jit(partial(splash_tower_attention, most=None, block=128))(q, k, v, jnp.asarray(group))
    assert_close(ours, plain(q, k, v, group), 1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_shards_compute_their_heads(count: int) -> None:
    """In a program that XLA cuts along the model; three heads do not divide over two shards."""
    group = images(131, 97)
    q, k, v = (x[:, :count] for x in heads(group, 8))
    mesh, rows = make_mesh(jax.devices()[:4], 2), PartitionSpec(WORK)
    shapes = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, group: jax.Array) -> jax.Array:
        def inner(q: jax.Array, k: jax.Array, v: jax.Array, group: jax.Array) -> jax.Array:
            shapes.append(q.shape)
            return WAYS["splash"](q, k, v, group, None)

        return split_heads(inner, count)(q, k, v, group)

    ours = jax.jit(split_over(attend, mesh, (WORK,), (rows,) * 4, rows))(q, k, v, jnp.asarray(group))
    assert shapes[0] == (1, 1 if count == 2 else 3, *q.shape[2:])
    real = np.broadcast_to((group == 0)[:, None, :, None], q.shape)
    assert_close(np.asarray(ours)[real], np.asarray(plain(q, k, v, group))[real], 1e-5)


def test_the_platform_decides() -> None:
    """Lowered for a TPU the kernel is there, for a CPU it is not, and small images need neither."""

    def lowered(patches: int, platform: str) -> str:
        group = images(patches)
        program = jax.jit(attend_groups).trace(*heads(group, 8), jnp.asarray(group))
        return program.lower(lowering_platforms=(platform,)).as_text()

    assert "tpu_custom_call" in lowered(WHOLE + 1, "tpu")
    assert "tpu_custom_call" not in lowered(WHOLE + 1, "cpu") + lowered(WHOLE + 1, "cuda") + lowered(WHOLE, "tpu")
    assert "while" not in lowered(WHOLE, "cpu")


@pytest.mark.parametrize(
    ("dtype", "most", "found"), [(jnp.bfloat16, None, True), (jnp.float32, None, False), (jnp.bfloat16, 9, False)]
)
def test_a_tower_in_bfloat16_without_windows_is_lowered_to_cudnn(
    dtype: jnp.dtype, most: int | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    group = jnp.asarray(images(WHOLE + 1, 131))
    program = jax.jit(partial(attend_groups, most=most)).trace(*(x.astype(dtype) for x in heads(group, 80)), group)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @__cudnn$fmhaSoftmax(" in line]
    assert len(calls) == found and ("while" in text) == (not found)
    # Queries, keys and values, and the lengths of both.
    assert all("mask_type\\22: \\22PADDING" in call and "tensor<2xi32>, tensor<2xi32>) ->" in call for call in calls)


def test_a_compiled_tower_holds_no_score_matrix() -> None:
    """The whole tower of the embedded model takes less memory than the scores of one head would."""
    kind, patches = read_model_kind("embedded"), 8192
    graph, state = nnx.split(kind.family.vision(kind.config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    arrays = [jax.ShapeDtypeStruct((1, *shape), dtype) for shape, dtype in kind.image_arrays((patches,))]
    compiled = jax.jit(lambda state, *arrays: nnx.merge(graph, state)(*arrays)).lower(state, *arrays).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * patches**2
