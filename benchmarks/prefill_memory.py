"""Compare the temporary memory of a prefill in one piece and in chunks, as planned by the compiler.

    python benchmarks/prefill_memory.py [--visual 16384]

Four layers with the widths of Qwen2-VL-7B, a prompt of 256 text and 7936 visual tokens, float32, batch 1. How many images the
visual tokens belong to changes nothing. Nothing is computed; it takes a minute. Expect for the dense plan 5.8 GB in one piece and
1.6 GB in chunks, for the reduced plan 2.0 and 1.6 GB, with all layers frozen 1.3 and 1.2 GB; with 16384 visual tokens 5.0 and
2.3 GB, 2.3 and 2.3 GB, 1.8 and 1.6 GB.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rlens_jax.engine.deployed_model import automatic_chunk
from rlens_jax.layout import TokenLayout
from rlens_jax.models.decoder import Decoder, DecoderConfig
from rlens_jax.models.generation import prefill
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.plans import SKIP, Plan, Reduction

TEXT = 256
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


PLANS = {
    "dense": Plan(),
    "reduced": Plan((0, 1, 2, 3), (0, 1, 2, 3)),
    "frozen": Plan.of(dict.fromkeys(range(4), SKIP), dict.fromkeys(range(4), SKIP)),
}


def temporary_bytes(plan: Plan, visual_tokens: int, chunk: int | None) -> int:
    """Memory of a compiled prefill without its arguments and results."""
    module = nnx.eval_shape(lambda: Decoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    layout = TokenLayout(integers(1, TEXT), integers(1, visual_tokens), integers(1, TEXT), *[integers(1)] * 3)
    rope = integers(1, len(CONFIG.rope_sections), TEXT + visual_tokens)
    batch = PromptBatch(integers(1, TEXT), layout, rope, *[integers(1, 1)] * 7)
    visual = jax.ShapeDtypeStruct((1, visual_tokens, CONFIG.width), jnp.float32)

    def run(state: Any, visual: Any, batch: PromptBatch) -> Any:
        decoder = nnx.merge(graph, state)
        return prefill(decoder, visual, batch, plan, Reduction(), 64, jax.random.key(0), chunk=chunk)

    compiled = jax.jit(run).lower(state, visual, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visual", type=int, default=7936, help="visual tokens")
    visual_tokens = parser.parse_args().visual
    chunk = automatic_chunk(1, TEXT + visual_tokens, CONFIG.ffn_width, itemsize=4)
    for name, plan in PLANS.items():
        whole, parts = (temporary_bytes(plan, visual_tokens, size) / 1e6 for size in (None, chunk))
        print(f"{name:<8} in one piece {whole:8.0f} MB, in chunks of {chunk} tokens {parts:8.0f} MB", flush=True)


if __name__ == "__main__":
    main()
