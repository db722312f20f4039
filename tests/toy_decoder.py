"""A small decoder with odd sizes; norms and biases are drawn too, since their initial values would hide mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlens_jax.models.decoder import Decoder, DecoderConfig

TOY = DecoderConfig(
    num_layers=5,
    width=24,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    ffn_width=53,
    vocabulary=37,
    context=512,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_sections=(2,),
    qkv_bias=True,
    tied_head=False,
)


def random_decoder(config: DecoderConfig, spread: float) -> Decoder:
    """Initial parameters with noise of this standard deviation added to every one."""
    decoder = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(decoder))
    rng = np.random.default_rng(1)
    drawn = [leaf + jnp.asarray(rng.standard_normal(leaf.shape) * spread, leaf.dtype) for leaf in leaves]
    nnx.update(decoder, jax.tree.unflatten(tree, drawn))
    return decoder
