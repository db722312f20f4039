"""Compare the temporary memory of a prefill in one piece and in chunks, as planned by the compiler.

    python benchmarks/prefill_memory.py

Four layers with the widths of Qwen2-VL-7B, a prompt of 256 text and 7936 visual tokens, float32, batch 1. Nothing is computed;
it takes a minute. Expect 5.5 GB for the dense plan in one piece and 1.6 GB in
chunks; 1.7 GB and 1.6 GB for the reduced plan.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rlens_jax.engine.deployed_model import automatic_chunk
from rlens_jax.layout import TokenLayout
from rlens_jax.models.decoder import Decoder, DecoderConfig
from rlens_jax.models.generation import prefill
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.plans import Plan, Reduction

TEXT, VISUAL = 256, 7936
CONFIG = DecoderConfig(
    num_layers=4,
    width=3584,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    ffn_width=18944,
    vocabulary=2,
    context=32768,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_sections=(16, 24, 24),
    qkv_bias=True,
    tied_head=True,
)


def temporary_bytes(plan: Plan, chunk: int | None) -> int:
    """Memory of a compiled prefill without its arguments and results."""
    module = nnx.eval_shape(lambda: Decoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    layout = TokenLayout(integers(1, TEXT), integers(1, VISUAL), integers(1, TEXT), *[integers(1)] * 3)
    rope = integers(1, len(CONFIG.rope_sections), TEXT + VISUAL)
    batch = PromptBatch(integers(1, TEXT), layout, rope, *[integers(1, 1)] * 7)
    visual = jax.ShapeDtypeStruct((1, VISUAL, CONFIG.width), jnp.float32)

    def run(state: Any, visual: Any, batch: PromptBatch) -> Any:
        decoder = nnx.merge(graph, state)
        return prefill(decoder, visual, batch, plan, Reduction(), 64, jax.random.key(0), chunk=chunk)

    compiled = jax.jit(run).lower(state, visual, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    chunk = automatic_chunk(1, TEXT + VISUAL, CONFIG.ffn_width, itemsize=4)
    for name, plan in (("dense", Plan()), ("reduced", Plan((0, 1, 2, 3), (0, 1, 2, 3)))):
        whole, parts = (temporary_bytes(plan, size) / 1e6 for size in (None, chunk))
        print(f"{name:<8} in one piece {whole:8.0f} MB, in chunks of {chunk} tokens {parts:8.0f} MB", flush=True)


if __name__ == "__main__":
    main()
