"""What is particular to the GPU's attention, on a machine without one; the contract of its pieces is in test_attention.py.

Programs are lowered for CUDA, and the calls of cuDNN in them are read. What this cannot check: that XLA's compiler for GPUs takes
the programs (`benchmarks/gpu_compile.py` does), that cuDNN supports these calls, what they compute and how fast
(`rlens_jax.doctor` does, where a GPU is).
"""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.sizes import abstract_model, decoder_arguments
from rlens_jax.engine.timing import static_prefill
from rlens_jax.layout import Bucket
from rlens_jax.ops import attention, attention_gpu
from rlens_jax.ops.attention import attend, reference_attention, suited_kernel
from rlens_jax.ops.attention_gpu import cudnn_attention
from rlens_jax.plans import TEXT, Plan, Reduction
from rlens_jax.sharding.mesh import make_mesh
from tests.numerics import error
from tests.sequences import make_layout, run_length

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
BAND, MASKED = "__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"


@pytest.fixture
def with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX finds a cuDNN, which only its lowering asks for."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)


def lowered(function: Callable[..., Any], *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def cudnn_calls(text: str) -> list[tuple[str, str, int]]:
    """Name, mask type and window of each call; 0 is no window."""
    found = []
    for line in text.splitlines():
        if match := re.search(r"custom_call @(__cudnn\S+?)\(", line):
            mask_type = re.search(r"mask_type\\22: \\22(\w+)", line)
            window = re.search(r"sliding_window_length\\22: (\d+)", line)
            assert mask_type and window
            found.append((match[1], mask_type[1], int(window[1])))
    return found


def drawn(layout: Any, dtype: Any = jnp.bfloat16, spread: float = 1.0) -> list[jax.Array]:
    rng, slots = np.random.default_rng(0), layout.bucket.slots
    shapes = [(1, heads, slots, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [jnp.asarray(scale * rng.standard_normal(shape), dtype) for scale, shape in zip((spread, 1, 1), shapes, strict=True)]


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("attention_range", [None, 1, 31, TEXT])
def test_visual_tokens_take_a_band_and_a_mask_and_text_takes_a_mask(attention_range: int | None) -> None:
    layout = make_layout([run_length(3, 131, 2)])
    text = lowered(lambda q, k, v: attend(q, k, v, layout, attention_range, kernel="cudnn"), *drawn(layout))
    band = [] if attention_range == TEXT else [(BAND, "CAUSAL", attention_range or 0)]
    # A window without CAUSAL would let queries see all later keys.
    assert sorted(cudnn_calls(text)) == sorted([*band, *[(MASKED, "NO_MASK", 0)] * 2])
    # Outputs, and the log-sum-exp, which is not rounded; text slots and keys under masks are padded to a multiple of 8.
    results = set(re.findall(r"\(tensor<(\S+)>, tensor<\S+>, tensor<0xui8>\)", text))
    assert results == {"1x6x8x16xbf16", "1x6x136x16xbf16", *(["1x6x131x16xbf16"] if band else [])}
    assert set(re.findall(r"xbf16>, tensor<1x6x\d+x(\w+)>, tensor<0xui8>", text)) == {"f32"}
    assert set(re.findall(r"tensor<1x1x(\d+x\d+)xbf16>\) ->", text)) == {"8x136", "136x8"}


@pytest.mark.usefixtures("with_cudnn")
def test_a_whole_prefill_lowers_for_cuda() -> None:
    """The engine's program of the embedded model in bfloat16, inside its `shard_map`: dense, and under a plan."""
    kind, mesh, reduction = read_model_kind("embedded"), make_mesh(jax.devices()[:1], 1), Reduction(attention_range=17)
    programs = Programs(abstract_model(kind, jnp.bfloat16, mesh), mesh, reduction, seed=0, new_tokens=1, stop_tokens=(0,))
    programs.kernel = "cudnn"
    visual, batch, _ = decoder_arguments(programs, Bucket(16, 64), 2)[programs.generate_program]

    def windows(plan: Plan) -> set[tuple[str, str, int]]:
        program: Any = static_prefill(programs, plan)
        text = program._jitted.trace(program._leaves, visual, batch).lower(lowering_platforms=("cuda",)).as_text()
        return set(cudnn_calls(text))

    masked = (MASKED, "NO_MASK", 0)
    assert windows(Plan()) == {(BAND, "CAUSAL", 0), masked}
    assert windows(Plan(attention=tuple(range(kind.config.decoder.num_layers)), ffn=(1,))) == {(BAND, "CAUSAL", 17), masked}


def test_nothing_is_lowered_to_cudnn_without_one() -> None:
    layout = make_layout([run_length(3, 13, 2)])
    assert not cudnn_calls(lowered(lambda q, k, v: attend(q, k, v, layout, 5, kernel="cudnn"), *drawn(layout)))


def gpu(capability: str = "9.0") -> Any:
    return SimpleNamespace(platform="gpu", device_kind="some GPU", compute_capability=capability)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "cudnn", "reason"),
    [
        (jnp.float32, 128, "9.0", True, "in bfloat16, not in float32"),
        (jnp.bfloat16, 136, "9.0", True, "heads of 136"),
        (jnp.bfloat16, 20, "9.0", True, "heads of 20"),
        (jnp.bfloat16, 128, "7.5", True, "a some GPU is older than Ampere"),
        (jnp.bfloat16, 128, "9.0", False, "cuDNN is not installed"),
        (jnp.bfloat16, 80, "8.0", True, None),
        (jnp.bfloat16, 128, "10.0", True, None),
    ],
)
def test_plain_xla_takes_over_where_cudnn_refuses_and_says_so_once(
    dtype: Any, head_dim: int, capability: str, cudnn: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cudnn:
        monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu(capability)])
    said: list[str] = []
    monkeypatch.setattr(attention, "say", said.append)
    attention._say_once.cache_clear()
    kernels = {suited_kernel(gpu(capability), dtype, head_dim) for _ in range(3)}
    assert kernels == {"cudnn" if reason is None else "packed"}
    assert len(said) == (reason is not None) and all(reason in line for line in said if reason)


def test_a_program_that_does_not_compile_is_a_refusal(with_cudnn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: no valid engine configs\nfurther lines")

    monkeypatch.setattr(attention_gpu, "cudnn_attention", broken)
    said: list[str] = []
    monkeypatch.setattr(attention, "say", said.append)
    attention._say_once.cache_clear()
    attention_gpu.compile_error.cache_clear()
    assert [suited_kernel(gpu(), jnp.bfloat16, 64) for _ in range(2)] == ["packed"] * 2
    attention_gpu.compile_error.cache_clear()
    line = "it takes a program that does not compile (INTERNAL: no valid engine configs)"
    assert said == [f"attention by plain XLA, not by cuDNN: {line}"]


def test_other_devices_have_their_own_kernels() -> None:
    kinds = {"tpu": "splash", "cpu": "packed"}
    assert {name: suited_kernel(SimpleNamespace(platform=name), jnp.bfloat16, 128) for name in kinds} == kinds


def test_a_window_of_positions_is_plain_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(attention, "say", said.append)
    attention._say_once.cache_clear()
    layout = make_layout([run_length(2, 7, 5, 11, 3)])
    q, k, v = drawn(layout, jnp.float32)

    def traced(attention_range: int | None, **options: Any) -> str:
        return str(jax.make_jaxpr(lambda *x: attend(*x, layout, attention_range, "position", **options))(q, k, v))

    assert traced(9, kernel="cudnn") == traced(9, kernel="cudnn") == traced(9, kernel="packed")
    assert traced(None, kernel="cudnn") != traced(None, kernel="packed")
    assert said == ["attention by plain XLA, not by cuDNN: its window counts visual tokens, not positions"]


def test_a_rounded_log_sum_exp_would_double_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `jax.nn.dot_product_attention` does to its residual, imitated: root mean square errors of the visual rows."""
    layout = make_layout([run_length(64, 389, 4)])
    q, k, v = drawn(layout, spread=2.0)
    visual = np.s_[:, :, layout.bucket.text :]
    exact = np.asarray(jax.jit(lambda *x: reference_attention(*x, layout, 131))(*(x.astype(jnp.float32) for x in (q, k, v))))[
        visual
    ]
    pieces = attention_gpu._plainly

    def rounded(*arguments: Any) -> Any:
        attended, total = pieces(*arguments)
        return attended, total.astype(jnp.bfloat16).astype(jnp.float32)

    def off() -> float:
        ours = np.asarray(jax.jit(lambda *x: cudnn_attention(*x, layout, 131))(q, k, v).astype(jnp.float32))[visual]
        assert error(ours, exact) < 2e-2
        return float(np.sqrt(((ours - exact) ** 2).mean() / (exact**2).mean()))

    as_is = off()
    monkeypatch.setattr(attention_gpu, "_plainly", rounded)
    assert as_is < 0.003 < 0.004 < off()
