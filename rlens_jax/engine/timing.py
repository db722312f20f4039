"""Measured times: of a plan's prefill against the dense model's, and of one decoder layer of a published shape.

Prefills run in static programs, as a deployed model runs them, up to the logits of the last token. The vision tower is the same
on both sides. The layer is that of `rlens_jax.bench`, dense and reduced.
"""

import importlib
import importlib.util
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float

from rlens_jax.console import say
from rlens_jax.engine.compile_ahead import compile_together
from rlens_jax.engine.model_programs import ROWS, Program
from rlens_jax.engine.pools import Batch
from rlens_jax.engine.programs import Programs
from rlens_jax.flops import DecoderSizes, layer_cost, shared_prefill_cost
from rlens_jax.layout import Bucket, Tokens, pack_layout, pack_rows
from rlens_jax.models.decoder import Context, Decoder, DecoderConfig
from rlens_jax.models.generation import prefill
from rlens_jax.models.prompt import FILLER, PromptBatch
from rlens_jax.ops.attention import Kernel, masked_attention
from rlens_jax.ops.ffn import dense_ffn
from rlens_jax.plans import FULL, STANDARD, Level, Plan, Reduction
from rlens_jax.search.front import PrefillTime

TEXT_BEFORE, VISUAL, TEXT_AFTER = 64, 1792, 64
OURS = "ours (packed, causal blocks)"
NO_ATTENTION = "no attention"
TORCH = "PyTorch SDPA"
CASES: dict[str, tuple[Level, Level]] = {"attention": (STANDARD, FULL), "ffn": (FULL, STANDARD), "both": (STANDARD, STANDARD)}
"""Name -> levels of attention and FFN."""

Attend = Callable[[Array, Array, Array], Array]
"""Queries [1, N, T, H], keys and values [1, K, T, H] -> attended [1, N, T, H]."""


class Turn(NamedTuple):
    """Seconds of one call: by the clock, and of all threads of this process on all cores."""

    wall: float
    cpu: float


def warm_up(functions: Sequence[Callable[[], Any]], advance: Callable[[], None] = lambda: None) -> None:
    """Call each function once, so that nothing is compiled when it is timed, and `advance` after each."""
    for function in functions:
        jax.block_until_ready(function())
        advance()


def time_turns(functions: Sequence[Callable[[], Any]], repeats: int) -> list[tuple[Turn, ...]]:
    """The repeats of each function; they take turns, so that a slow moment of the machine hits all of them.

    The turns have another order each time: what ran before leaves the caches in a state of its own. The functions have run
    before (`warm_up`).
    """
    turns: list[list[Turn]] = [[] for _ in functions]
    for repeat in range(repeats):
        for place in random.Random(repeat).sample(range(len(functions)), len(functions)):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(functions[place]())
            turns[place].append(Turn(time.perf_counter() - wall, time.process_time() - cpu))
    return [tuple(each) for each in turns]


def time_side_by_side(functions: Sequence[Callable[[], Any]], repeats: int) -> list[tuple[float, ...]]:
    """Seconds by the clock of each function's repeats, as `time_turns`, after a call of each."""
    warm_up(functions)
    return [tuple(turn.wall for turn in turns) for turns in time_turns(functions, repeats)]


def deciding_seconds(turns: Sequence[Turn]) -> float:
    """The time by which savings are judged: the least on the CPU where JAX computes there, else the least by the clock.

    Other work on the machine can only add to a time, and it adds more to that of the clock.
    """
    return min(turn.cpu if jax.default_backend() == "cpu" else turn.wall for turn in turns)


def statistics_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """Least and median of both times, and their spread: the largest time over the least."""
    found: dict[str, Any] = {}
    for name in Turn._fields:
        values = [getattr(turn, name) for turn in turns]
        found[name] = {"least": min(values), "median": median(values), "spread": max(values) / min(values)}
    return found


def time_plans(
    programs: Programs,
    batch: Batch,
    plans: Mapping[str, Plan],
    repeats: int,
    baseline: Plan | None = None,
    batches: Mapping[str, Batch] = MappingProxyType({}),
) -> dict[str, PrefillTime]:
    """The times of one batch's prefill under each plan, each beside `baseline` (dense) and compiled for its plan alone.

    `batches` are those that some plans run on in place of `batch`, such as the same samples with smaller images.
    """
    baseline, times = baseline or Plan(), {}
    put = {id(each): (programs.put(each.visual), each.inputs) for each in (batch, *batches.values())}
    calls = {name: (static_prefill(programs, plan), put[id(batches.get(name, batch))]) for name, plan in plans.items()}
    dense = static_prefill(programs, baseline), put[id(batch)]
    compile_together([dense, *calls.values()])
    for name, call in calls.items():
        whole, reduced = time_side_by_side([partial(program, *arguments) for program, arguments in (dense, call)], repeats)
        own = batches.get(name, batch)
        flops = layer_flops(programs, batch, baseline), layer_flops(programs, own, plans[name])
        times[name] = PrefillTime(whole, reduced, *flops, len(own.inputs.samples), *own.inputs.layout.bucket.size)
    return times


def layer_flops(programs: Programs, batch: Batch, plan: Plan) -> int:
    """Multiplications and additions of the decoder layers for the tokens of a batch, its prompts as branches, with probes.

    The batch is that of all processes, which call this together.
    """
    layout, sizes, num_layers = batch.inputs.layout, programs.config.layer_sizes, programs.config.num_layers
    arrays = batch.inputs.samples, layout.text_branch, layout.num_text, layout.num_visual
    samples, text_branch, num_text, num_visual = multihost_utils.process_allgather(arrays, tiled=True)
    total = 0.0
    for row in np.flatnonzero((samples != FILLER).any(axis=1)):
        branches = np.bincount(text_branch[row, : num_text[row]])
        trunk, *own = map(int, branches)
        own = own or [0]  # a single prompt may have no branch
        visual = [int(num_visual[row])] * num_layers
        cost = partial(shared_prefill_cost, sizes, visual_in_layer=visual, plan=plan, reduction=programs.reduction)
        total += sum(cost(trunk + text, trunk_text=trunk, sharers=len(own), with_probes=True) for text in own)
    return 2 * round(total)


def static_prefill(programs: Programs, plan: Plan) -> Program:
    """A prefill up to the first new token that is compiled for one plan alone, as a deployed model runs it."""

    def run(model: Any, visual: Array, batch: PromptBatch) -> Array:
        key = programs.random_key()
        return prefill(model.decoder, visual, batch, plan, programs.reduction, 1, key, programs.kernel)[0]

    return programs.once(("static prefill", plan), lambda: programs.program("static prefill", run, (ROWS, ROWS), ROWS))


def time_layer(model: str, decoder: DecoderSizes, visual_tokens: int, repeats: int) -> dict[str, Any]:
    """All timings of a layer of `model`, as the JSON file of `rlens_jax.bench` has them."""
    say("compiling ...")
    programs = layer_programs(decoder, CASES, visual_tokens)
    torch_program = torch_layer(decoder, visual_tokens)
    if torch_program is not None:
        programs[TORCH] = torch_program
    calls = list(programs.values())
    warm_up(calls)
    measured = dict(zip(programs, time_turns(calls, repeats), strict=True))
    seconds = {name: deciding_seconds(turns) for name, turns in measured.items()}
    dense = {name: seconds[name] for name in measured if name not in (*CASES, NO_ATTENTION)}
    fastest = min((name for name in dense if name != TORCH), key=lambda name: dense[name])
    cost = partial(layer_cost, decoder.layer_sizes, TEXT_BEFORE + TEXT_AFTER, visual_tokens, Reduction(), with_probes=True)

    def saving(name: str) -> dict[str, Any]:
        medians = [median(turn.wall for turn in measured[each]) for each in (name, fastest)]
        saved = {"time_saved": 1 - seconds[name] / dense[fastest], "time_saved_by_median_wall": 1 - medians[0] / medians[1]}
        return {"seconds": seconds[name], **saved, "times": statistics_of(measured[name])}

    cases = {}
    for name, (attention, ffn) in CASES.items():
        flops_saved = 1 - cost(attention=attention, ffn=ffn) / cost(attention=FULL, ffn=FULL)
        found = saving(name)
        realised = found["time_saved"] / flops_saved if flops_saved else None  # a range over all tokens saves nothing
        cases[name] = {**found, "flops_saved": flops_saved, "realised_saving": realised}
    return {
        "schema": "rlens-bench/2",
        "layer": model,
        "text_tokens": TEXT_BEFORE + TEXT_AFTER,
        "visual_tokens": visual_tokens,
        "dtype": "float32",
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "repeats": repeats,
        "decides": "least cpu" if jax.default_backend() == "cpu" else "least wall",
        "dense": {name: {"seconds": value, "times": statistics_of(measured[name])} for name, value in dense.items()},
        "without_attention": saving(NO_ATTENTION),
        "cases": cases,
    }


def layer_programs(
    published: DecoderSizes, cases: Mapping[str, tuple[Level, Level]], num_visual: int = VISUAL
) -> dict[str, Callable[[], Any]]:
    """The layer with each kind of dense attention, without attention, and with the levels of each case, as calls."""
    decoder, x, packed, in_order = decoder_inputs(published, 1, num_visual)
    graph, state = nnx.split(decoder.layer(0))
    causal = jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))

    def ours(attention: Level, ffn: Level, state: Any, context: Context) -> Array:
        return nnx.merge(graph, state)(x, context, Reduction(), attention, ffn, jnp.int32(0))[0]

    def other(attend: Attend, state: Any, context: Context) -> Array:
        layer = nnx.merge(graph, state)
        attended = attend(*layer.attention.project(layer.input_norm(x), context.rotary))
        y = x + layer.attention.o_proj(attended)
        return y + dense_ffn(layer.ffn_norm(y), layer.ffn.weights)

    def nothing(q: Array, k: Array, v: Array) -> Array:
        # Uses every projection, so that XLA computes them all.
        return q + jnp.repeat(k + v, published.num_heads // published.num_kv_heads, axis=1)

    def call(function: Callable[..., Array], context: Context) -> Callable[[], Array]:
        program = jax.jit(function)
        return lambda: program(state, context)

    return {
        OURS: call(partial(ours, FULL, FULL), packed),
        **{name: call(partial(other, attend), in_order) for name, attend in dense_kinds(causal).items()},
        NO_ATTENTION: call(partial(other, nothing), in_order),
        **{name: call(partial(ours, *levels), packed) for name, levels in cases.items()},
    }


def decoder_inputs(
    published: DecoderSizes,
    num_layers: int,
    num_visual: int = VISUAL,
    dtype: str = "float32",
    kernel: Kernel = "packed",
    batch: int = 1,
    vocabulary: int = 2,
) -> tuple[Decoder, Float[Array, "B T D"], Context, Context]:
    """A random decoder with such layers, states, and the contexts of packed tokens and of tokens in sequence order."""
    length = TEXT_BEFORE + num_visual + TEXT_AFTER
    config = DecoderConfig(
        num_layers=num_layers,
        width=published.width,
        num_heads=published.num_heads,
        num_kv_heads=published.num_kv_heads,
        head_dim=published.head_dim,
        ffn_width=published.ffn_width,
        vocabulary=vocabulary,
        context=length,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_sections=(published.head_dim // 2,),
        qkv_bias=published.qkv_bias,
        qk_norm=published.qk_norm,
        tied_head=True,
    )
    is_visual = np.zeros(length, bool)
    is_visual[TEXT_BEFORE : TEXT_BEFORE + num_visual] = True
    bucket = Bucket(TEXT_BEFORE + TEXT_AFTER, num_visual)
    layout = pack_layout([Tokens.sequence(is_visual)] * batch, bucket, range(batch))
    in_order = np.arange(length, dtype=np.int32)[:, None]
    decoder = Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (batch, length, config.width), dtype)
    layout = jax.tree.map(jnp.asarray, layout)
    packed, ordered = (
        decoder.context(layout, jnp.asarray(positions), jax.random.key(0), kernel)
        for positions in (pack_rows([in_order] * batch, layout).transpose(0, 2, 1), np.repeat(in_order.T[None], batch, axis=0))
    )
    return decoder, x, packed, ordered


def dense_kinds(causal: Bool[Array, "1 T T"]) -> dict[str, Attend]:
    """Ways to compute dense attention of tokens in sequence order, by name."""
    length = causal.shape[1]

    def einsum(q: Array, k: Array, v: Array) -> Array:
        return masked_attention(q, k, v, causal)

    def dot_product(q: Array, k: Array, v: Array) -> Array:
        heads_inside = [part.swapaxes(1, 2) for part in (q, k, v)]
        return jax.nn.dot_product_attention(*heads_inside, is_causal=True).swapaxes(1, 2)

    def blocked(q: Array, k: Array, v: Array) -> Array:
        block = 256
        spans = [(start, min(start + block, length)) for start in range(0, length, block)]
        parts = [masked_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal[:, a:b, :b]) for a, b in spans]
        return jnp.concatenate(parts, axis=2)

    return {"einsum": einsum, "jax.nn.dot_product_attention": dot_product, "causal blocks": blocked}


def torch_layer(
    published: DecoderSizes, num_visual: int, batch: int = 1, count: int = 1, *, on_gpu: bool = False
) -> Callable[[], None] | None:
    """`count` times the same dense layer in PyTorch, in float32 on the CPU or in bfloat16 on a GPU.

    None if PyTorch is not installed, or does not have the GPU.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    if on_gpu and not torch.cuda.is_available():
        return None
    placed = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {}
    functional = torch.nn.functional
    width, ffn_width, head_dim = published.width, published.ffn_width, published.head_dim
    heads, kv_heads = published.num_heads, published.num_kv_heads
    length = TEXT_BEFORE + num_visual + TEXT_AFTER
    q, k, v, o, gate, up, down = (
        torch.randn(rows, columns, **placed) * columns**-0.5
        for rows, columns in (
            (heads * head_dim, width),
            (kv_heads * head_dim, width),
            (kv_heads * head_dim, width),
            (width, heads * head_dim),
            (ffn_width, width),
            (ffn_width, width),
            (width, ffn_width),
        )
    )
    x = torch.randn(batch, length, width, **placed)

    def layer() -> Any:
        with torch.no_grad():
            y = functional.rms_norm(x, (width,))
            split = [
                functional.linear(y, w).view(batch, length, n, head_dim).transpose(1, 2)
                for w, n in ((q, heads), (k, kv_heads), (v, kv_heads))
            ]
            if published.qk_norm:
                split[:2] = (functional.rms_norm(part, (head_dim,)) for part in split[:2])
            attended = functional.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=True)
            z = x + functional.linear(attended.transpose(1, 2).flatten(2), o)
            y = functional.rms_norm(z, (width,))
            hidden = functional.silu(functional.linear(y, gate)) * functional.linear(y, up)
            return z + functional.linear(hidden, down)

    def layers() -> None:
        for _ in range(count):
            layer()
        if on_gpu:
            torch.cuda.synchronize()

    return layers
