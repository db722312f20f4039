"""Time saved by the reductions in one decoder layer, against the fastest dense layer: `python -m rlens_jax.bench [--json FILE]`.

The layer has the widths of a published model (Qwen2-VL-2B unless another is named); 1792 visual tokens stand between 64 and 64
text tokens, float32, batch 1. All programs take turns, medians are reported. `realised_saving` is (1 - time ratio) / (1 - FLOPs
ratio), the FLOPs being those of the field's formula with the probes counted; the dense time is that of the fastest of four kinds
of dense attention. A layer whose heads attend to nothing is timed too: what it saves is the most that any attention could.
With the extra `torch` installed, PyTorch's layer with SDPA is timed beside, for orientation.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rlens_jax.console import ArgumentParser, run_command, say
from rlens_jax.files import json_text
from rlens_jax.flops import LayerSizes, layer_cost
from rlens_jax.plan import Reduction

TEXT_BEFORE, VISUAL, TEXT_AFTER = 64, 1792, 64
OURS = "ours (packed, causal blocks)"
WITHOUT = "no attention"


@dataclass(frozen=True)
class Widths:
    """Widths of a published decoder layer."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    qkv_bias: bool


LAYERS = {
    "qwen2-vl-2b": Widths(1536, 12, 2, 128, 8960, qkv_bias=True),
    "internvl2-8b": Widths(4096, 32, 8, 128, 14336, qkv_bias=False),
    "llava-onevision-0.5b": Widths(896, 14, 2, 64, 4864, qkv_bias=True),
}
CASES = {"attention": (True, False), "ffn": (False, True), "both": (True, True)}
"""Name -> (hollow, dynamic)."""


@dataclass(frozen=True)
class Case:
    """One operator, or both: seconds are medians, shares are of the dense layer."""

    seconds: float
    flops_saved: float
    time_saved: float
    realised_saving: float


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print."""
    parser = ArgumentParser("python -m rlens_jax.bench", __doc__)
    parser.add_argument("--layer", choices=LAYERS, default="qwen2-vl-2b", help="the model whose widths are taken")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=15, help="how often each program is timed")
    options = parser.parse_args(arguments)
    results = measure(options.layer, options.repeats)
    for name, seconds in results["dense_seconds"].items():
        print(f"dense, {name:<34}{seconds * 1e3:9.1f} ms")
    without = results["without_attention"]
    print(f"{WITHOUT:<12}{without['seconds'] * 1e3:9.1f} ms   {'':20} time saved {without['time_saved']:6.1%}")
    for name, case in results["cases"].items():
        print(
            f"{name:<12}{case['seconds'] * 1e3:9.1f} ms   FLOPs saved {case['flops_saved']:6.1%}   "
            f"time saved {case['time_saved']:6.1%}   realised {case['realised_saving']:.2f}"
        )
    if options.json:
        options.json.write_text(json_text(results), encoding="utf-8")


def measure(layer: str, repeats: int) -> dict[str, Any]:
    """All timings, as the JSON file has them."""
    import jax

    from rlens_jax.engine.timing import time_side_by_side

    say("compiling ...")
    widths = LAYERS[layer]
    programs = _programs(widths)
    other = torch_layer(widths)
    if other is not None:
        programs["PyTorch SDPA"] = other
    measured = dict(zip(programs, time_side_by_side(list(programs.values()), repeats), strict=True))
    seconds = {name: median(values) for name, values in measured.items()}
    without = seconds.pop(WITHOUT)
    dense = {name: value for name, value in seconds.items() if name not in CASES}
    baseline = min(value for name, value in dense.items() if name != "PyTorch SDPA")
    sizes = LayerSizes(widths.width, widths.num_kv_heads * widths.head_dim, widths.ffn_width)
    reduction = Reduction()
    cost = partial(layer_cost, sizes, TEXT_BEFORE + TEXT_AFTER, VISUAL, reduction, with_probes=True)
    cases = {}
    for name, (hollow, dynamic) in CASES.items():
        flops_saved = 1 - cost(hollow=hollow, dynamic=dynamic) / cost(hollow=False, dynamic=False)
        time_saved = 1 - seconds[name] / baseline
        cases[name] = asdict(Case(seconds[name], flops_saved, time_saved, time_saved / flops_saved))
    return {
        "schema": "rlens-bench/1",
        "layer": layer,
        "text_tokens": TEXT_BEFORE + TEXT_AFTER,
        "visual_tokens": VISUAL,
        "dtype": "float32",
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "repeats": repeats,
        "dense_seconds": dense,
        "without_attention": {"seconds": without, "time_saved": 1 - without / baseline},
        "cases": cases,
    }


def _programs(widths: Widths) -> dict[str, Callable[[], Any]]:
    """The layer with each kind of dense attention, and under each reduction, each as a call without arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from rlens_jax.models.decoder import Context
    from rlens_jax.ops.ffn import dense_ffn

    decoder, x, packed, in_order = decoder_inputs(widths, num_layers=1)
    graph, state = nnx.split(decoder.layer(0))
    causal = jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))

    def ours(hollow: bool, dynamic: bool, state: Any, context: Context) -> Any:
        return nnx.merge(graph, state)(x, context, Reduction(), hollow, dynamic, jnp.int32(0))[0]

    def other(attend: Callable[[Any, Any, Any], Any], state: Any, context: Context) -> Any:
        layer = nnx.merge(graph, state)
        attended = attend(*layer.attention.project(layer.input_norm(x), context.turn))
        y = x + layer.attention.o_proj(attended)
        return y + dense_ffn(layer.ffn_norm(y), layer.ffn.weights)

    def nothing(q: Any, k: Any, v: Any) -> Any:
        # Every projection is used, or it would not be computed.
        return q + jnp.repeat(k + v, widths.num_heads // widths.num_kv_heads, axis=1)

    dense = dense_kinds(causal)

    def call(function: Callable[..., Any], context: Context) -> Callable[[], Any]:
        program = jax.jit(function)
        return lambda: program(state, context)

    return {
        OURS: call(partial(ours, False, False), packed),
        **{name: call(partial(other, attend), in_order) for name, attend in dense.items()},
        WITHOUT: call(partial(other, nothing), in_order),
        **{name: call(partial(ours, *flags), packed) for name, flags in CASES.items()},
    }


def decoder_inputs(widths: Widths, num_layers: int) -> tuple[Any, Any, Any, Any]:
    """A random decoder of such layers, states float32 [1, T, D], and the contexts of packed tokens and of tokens in order."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from rlens_jax.layout import Bucket, pack_layout, pack_rows
    from rlens_jax.models.decoder import Decoder, DecoderConfig

    length = TEXT_BEFORE + VISUAL + TEXT_AFTER
    config = DecoderConfig(
        num_layers=num_layers,
        width=widths.width,
        num_heads=widths.num_heads,
        num_kv_heads=widths.num_kv_heads,
        head_dim=widths.head_dim,
        ffn_width=widths.ffn_width,
        vocabulary=2,
        context=length,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_sections=(widths.head_dim // 2,),
        qkv_bias=widths.qkv_bias,
        tied_head=True,
    )
    is_visual = np.zeros(length, bool)
    is_visual[TEXT_BEFORE : TEXT_BEFORE + VISUAL] = True
    layout = pack_layout([is_visual], Bucket(TEXT_BEFORE + TEXT_AFTER, VISUAL), [0])
    in_order = np.arange(length, dtype=np.int32)[:, None]
    decoder = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, length, config.width))
    layout = jax.tree.map(jnp.asarray, layout)
    packed, ordered = (
        decoder.context(layout, jnp.asarray(positions), jax.random.key(0))
        for positions in (pack_rows([in_order], layout).transpose(0, 2, 1), in_order.T[None])
    )
    return decoder, x, packed, ordered


def dense_kinds(causal: Any) -> dict[str, Callable[[Any, Any, Any], Any]]:
    """Ways to compute dense attention of tokens in sequence order, by name; `causal` is bool [1, T, T]."""
    import jax
    import jax.numpy as jnp

    from rlens_jax.ops.attention import masked_attention

    length = causal.shape[1]

    def einsum(q: Any, k: Any, v: Any) -> Any:
        return masked_attention(q, k, v, causal)

    def dot_product(q: Any, k: Any, v: Any) -> Any:
        heads_inside = [part.swapaxes(1, 2) for part in (q, k, v)]
        return jax.nn.dot_product_attention(*heads_inside, is_causal=True).swapaxes(1, 2)

    def blocked(q: Any, k: Any, v: Any) -> Any:
        block = 256
        spans = [(start, min(start + block, length)) for start in range(0, length, block)]
        parts = [masked_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal[:, a:b, :b]) for a, b in spans]
        return jnp.concatenate(parts, axis=2)

    return {"einsum": einsum, "jax.nn.dot_product_attention": dot_product, "causal blocks": blocked}


def torch_layer(widths: Widths) -> Callable[[], Any] | None:
    """The same dense layer in PyTorch, if that is installed; nothing else of the project uses it."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    functional = torch.nn.functional
    width, ffn_width = widths.width, widths.ffn_width
    heads, kv_heads, head_dim = widths.num_heads, widths.num_kv_heads, widths.head_dim
    length = TEXT_BEFORE + VISUAL + TEXT_AFTER
    q, k, v, o, gate, up, down = (
        torch.randn(rows, columns) * columns**-0.5
        for rows, columns in (
            (width, width),
            (kv_heads * head_dim, width),
            (kv_heads * head_dim, width),
            (width, width),
            (ffn_width, width),
            (ffn_width, width),
            (width, ffn_width),
        )
    )
    x = torch.randn(1, length, width)

    def layer() -> Any:
        with torch.no_grad():
            y = functional.rms_norm(x, (width,))
            split = [
                functional.linear(y, w).view(1, length, n, head_dim).transpose(1, 2)
                for w, n in ((q, heads), (k, kv_heads), (v, kv_heads))
            ]
            attended = functional.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=True)
            z = x + functional.linear(attended.transpose(1, 2).reshape(1, length, width), o)
            y = functional.rms_norm(z, (width,))
            hidden = functional.silu(functional.linear(y, gate)) * functional.linear(y, up)
            return (z + functional.linear(hidden, down)).numpy()

    return layer


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
