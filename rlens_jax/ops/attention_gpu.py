"""Attention on an NVIDIA GPU: dense and Hollow Attention by cuDNN's fused kernel, which forms scores on the chip only.

Packed slots are two runs, text and visual (rlens_jax/layout.py). cuDNN computes three pieces:

    visual to visual    A band over slots: causal, with a sliding window of R slots for Hollow Attention. Padding comes last, so
                        no token sees it, and the band needs no sequence lengths.
    visual to text      Which text precedes which visual token is data, one number per visual token: with text between images no
                        sequence length says it. A mask [B, P, X] does, of the `slots_before_visual` only. It is exact for any
                        images, and one for all heads: 2 MB a row for 8192 visual and 128 text slots, where the queries take
                        59 MB (28 heads of 128). Sequence lengths for the text before the first image would need a third call
                        for the text between images, with the same mask, and would save reading it.
    text to all         One call with a mask [B, X, X + P], which has branches and text between images in it. Text has few rows,
                        so it computes the later half of its scores in vain and needs no merge.

The two visual pieces are merged by their log-sum-exp, in float32. `jax.nn.dot_product_attention(return_residual=True)` rounds it
to the compute dtype: in bfloat16 a sum of exponentials is then off by up to 3.1 % where its logarithm is 8 to 16. At 1792 visual
and 64 text tokens, R = 256, heads of 128, that doubles the error of bfloat16 outputs: root mean square 0.52 % against 0.23 %,
largest 0.95 % against 0.42 % (`tests/ops/test_attention_gpu.py` imitates it). So this module calls what is behind that function,
`jax._src.cudnn.fused_attention_stablehlo`, which returns the float32 that cuDNN writes. It also names the mask CAUSAL: in JAX
0.10.2 `local_window_size=(R - 1, 0)` without `is_causal` gives cuDNN the left bound alone, and queries see all later keys (pull
request 39576 of jax-ml/jax). Tokamax' attention returns float32, too, and has masks by first and last key. But its two numbers
per query are no band and a prefix at once, so the merge would stay, and it is one more dependency that nobody here could run.

In a vision tower all patches of an image see each other, and padding follows: sequence lengths say it (`cudnn_first_keys`).

`_plainly` computes the same pieces in plain XLA, outputs and log-sum-exp, wherever cuDNN is not: on a CPU everything but speed is
tested. No GPU was at hand. Without one it is checked that whole programs lower for CUDA with the calls that are meant
(`tests/ops/test_attention_gpu.py`), and that XLA compiles them for an H100 (`benchmarks/gpu_compile.py`). Not checked is whether
cuDNN accepts the calls, whose kernels XLA builds on the card, what it computes, and how fast; masks are padded to a multiple of 8
slots in both directions, as a caution. `rlens_jax.doctor` checks these on a GPU, and `suited_kernel` compiles a small program
first.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.errors import UserError, foreign
from rlens_jax.layout import KV, Bucket, Queries, Range, TokenLayout, Tokens, pack_layout, visible
from rlens_jax.plans import TEXT

MOST_HEAD_DIM, HEAD_DIM_UNIT, LEAST_CAPABILITY = 128, 8, (8, 0)
"""What cuDNN takes on every GPU from Ampere on; Hopper also has larger heads."""

MASK_UNIT = 8
"""Slots of a mask in both directions are padded to a multiple of it."""

_UNSEEN = -1e30
"""Score of an invisible key in plain XLA: finite, so rows without keys are."""

Heads = Float[Array, "B T N H"]
Others = Float[Array, "B S K H"]
"""Keys or values."""
Seen = Bool[Array, "B T S"] | Int[Array, " B"] | None
"""The keys that each query sees; or how many of the first slots of a row see each other; or, by None, a band."""
Piece = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]
"""Outputs in the dtype of the queries, and the log-sum-exp of the scores in float32."""


def refusal(dtype: DTypeLike, head_dim: int) -> str | None:
    """Why cuDNN cannot compute attention here, None if it can as far as JAX knows; the device is the first of this process."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, not in {jnp.dtype(dtype).name}"
    if head_dim > MOST_HEAD_DIM or head_dim % HEAD_DIM_UNIT:
        return f"heads of {head_dim} are not a multiple of {HEAD_DIM_UNIT} up to {MOST_HEAD_DIM}"
    device = jax.local_devices()[0]  # before the next step: JAX loads cuDNN when it looks for devices
    try:
        fused.check_cudnn_version()
    except RuntimeError:
        return "cuDNN is not installed"
    if device.platform == "gpu" and tuple(map(int, device.compute_capability.split("."))) < LEAST_CAPABILITY:
        return f"a {device.device_kind} is older than Ampere"
    return None


@cache
def compile_error(head_dim: int) -> str | None:
    """Why a small program, dense or hollow, does not compile on the first device of this process; None if both do."""
    layout = pack_layout([Tokens.sequence(np.arange(24) >= 8)], Bucket(8, 16), [0])
    q, k = (jax.ShapeDtypeStruct((1, heads, 24, head_dim), jnp.bfloat16) for heads in (4, 2))
    try:
        with foreign("it takes a program that does not compile"):
            for attention_range in (None, 4):
                attend = partial(cudnn_attention, layout=layout, attention_range=attention_range)
                jax.jit(attend).lower(q, k, k).compile()
    except UserError as error:
        return str(error)
    return None


def cudnn_attention(q: Queries, k: KV, v: KV, layout: TokenLayout, attention_range: Range) -> Queries:
    """Dense or Hollow Attention of a packed batch, with the ordinal window; same result as `reference_attention`.

    On an NVIDIA GPU, where `refusal` has no reason, cuDNN computes it. There a mask lowers the scores of other keys by 2^41, so
    padding must hold ordinary numbers, as the states of padding do. All arrays are local: inside a `shard_map`, N and K are the
    heads of one shard. It has no gradient.

    Returns:
        Outputs in the dtype of `q`; rows of empty slots are finite and have no meaning.
    """
    num_text = layout.bucket.text
    of_text = cudnn_text_attention(q[:, :, :num_text], k, v, layout)
    if not layout.bucket.visual:
        return of_text
    if attention_range is not None and attention_range >= layout.bucket.visual:
        attention_range = None
    queries, keys, values = (x.swapaxes(1, 2) for x in (q, k, v))
    of_visual = _visual_rows(queries[:, num_text:], keys, values, layout, attention_range)
    return jnp.concatenate([of_text, of_visual.swapaxes(1, 2)], axis=2)


def cudnn_text_attention(q: Float[Array, "B N X H"], k: KV, v: KV, layout: TokenLayout) -> Float[Array, "B N X H"]:
    """The rows of dense `cudnn_attention` in text slots alone, from the queries of these slots."""
    queries, keys, values = (x.swapaxes(1, 2) for x in (q, k, v))
    attended, _ = _attend(queries, keys, values, visible(layout.text, layout.slots, None))
    return attended.swapaxes(1, 2)


def _visual_rows(q: Heads, k: Others, v: Others, layout: TokenLayout, attention_range: Range) -> Heads:
    """The rows of the visual slots, from their queries and all keys."""
    num_text, before = layout.bucket.text, layout.slots_before_visual
    band, total = jnp.zeros(q.shape, jnp.float32), None
    if attention_range != TEXT:
        near, total = _attend(q, k[:, num_text:], v[:, num_text:], None, attention_range)
        band = near.astype(jnp.float32)
    if before:
        mask = visible(layout.visual, layout.text.cut(lambda x: x[:, :before]), None)
        text, text_total = _attend(q, k[:, :before], v[:, :before], mask)
        # Without text before it, a query's row and its sum are those of arbitrary keys, or what the kernel leaves there.
        sees = mask.any(axis=2)[:, :, None]
        share = jnp.where(sees, 1.0 if total is None else jax.nn.sigmoid(text_total - total), 0.0)[..., None]
        band = band * (1 - share) + jnp.where(sees[..., None], text.astype(jnp.float32), 0.0) * share
    return band.astype(q.dtype)


def cudnn_first_keys(q: Queries, k: KV, v: KV, count: Int[Array, " B"]) -> Queries:
    """Attention of the first `count` slots of each row to each other, as of patches of an image that padding follows.

    `refusal` as in `cudnn_attention`. Outputs of the other slots are 0.
    """
    queries, keys, values = (x.swapaxes(1, 2) for x in (q, k, v))
    attended, _ = _attend(queries, keys, values, count)
    there = jnp.arange(q.shape[2])[None] < count[:, None]
    return jnp.where(there[:, None, :, None], attended.swapaxes(1, 2), jnp.zeros((), q.dtype))


def _attend(q: Heads, k: Others, v: Others, seen: Seen, band: int | None = None) -> Piece:
    """Attention to the keys that are `seen`, or of each slot to the `band` slots up to itself (None: to all of these)."""
    if refusal(q.dtype, q.shape[-1]) is not None:
        return _plainly(q, k, v, seen, band)
    ways = {"cuda": partial(_by_cudnn, band=band), "default": partial(_plainly, band=band)}
    return jax.lax.platform_dependent(q, k, v, seen, **ways)


def _by_cudnn(q: Heads, k: Others, v: Others, seen: Seen, band: int | None) -> Piece:
    call = partial(fused.dot_product_attention, scale=q.shape[-1] ** -0.5, return_residual=True)
    length = q.shape[1]
    if seen is None:
        attended, total = call(q, k, v, mask_type=fused.MaskType.CAUSAL, sliding_window_length=band)
    elif seen.ndim == 1:
        attended, total = call(q, k, v, q_seqlen=seen, kv_seqlen=seen, mask_type=fused.MaskType.PADDING)
    else:
        more, other = (-x.shape[1] % MASK_UNIT for x in (q, k))
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x, pad in ((q, more), (k, other), (v, other)))
        attended, total = call(q, k, v, mask=jnp.pad(seen, ((0, 0), (0, more), (0, other)))[:, None])
    return attended[:, :length], total.swapaxes(1, 2)[:, :length]


def _plainly(q: Heads, k: Others, v: Others, seen: Seen, band: int | None) -> Piece:
    query, key = jnp.arange(q.shape[1])[None, :, None], jnp.arange(k.shape[1])[None, None]
    if seen is None:
        mask = (query >= key) & (query - key < (q.shape[1] if band is None else band))
    else:
        mask = seen if seen.ndim == 3 else key < seen[:, None, None]
    # A CPU has not all bfloat16 products, and float32 holds those of bfloat16 factors.
    queries, keys, values = (x.astype(jnp.float32) for x in (q, k, v))
    grouped = queries.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, keys) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, :, None, None], scores, _UNSEEN)
    total = jax.nn.logsumexp(scores, axis=-1)
    attended = jnp.einsum("BTKGS,BSKH->BTKGH", jnp.exp(scores - total[..., None]), values)
    return attended.astype(q.dtype).reshape(q.shape), total.reshape(q.shape[:3])
