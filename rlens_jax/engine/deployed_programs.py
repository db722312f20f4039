"""The compiled programs of a deployed model: a prefill per plan, and one decoding program for all plans."""

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.engine.model_programs import ROWS, ModelPrograms, Program
from rlens_jax.models.decoder import KVCache
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.generation import decode, prefill
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.plan import Plan, Reduction
from rlens_jax.plan_file import PlanFile
from rlens_jax.pruning import VTW, FastV, Pruning
from rlens_jax.pytrees import pytree, unchecked
from rlens_jax.sharding.model_axis import MODEL, WORK

HIDDEN_BYTES = 64_000_000
"""Bytes of the hidden units of a chunk of tokens on a device (our decision): larger chunks are not faster."""
LEAST_TOKENS = 1024
"""Min tokens of a chunk, over all rows: fewer do not fill the machine."""
_NO_TOKEN = -1
"""A stop token that no model generates."""


@pytree
class Prefilled:
    """A batch whose prompts are in the cache."""

    first: Int[Array, " B"]
    """The first new token of each row."""
    caches: tuple[KVCache, ...]
    """One cache for all layers, or two if tokens were pruned between layers."""
    scored: Bool[Array, " B"]
    """Whether all scores of probes and of pruned tokens were numbers."""


_HEADS = PartitionSpec(None, WORK, MODEL)
_CACHE = unchecked(KVCache, k=_HEADS, v=_HEADS, position=ROWS)
"""The partition of a cache over the mesh."""


def automatic_chunk(rows: int, slots: int, ffn_width: int, itemsize: int) -> int | None:
    """Tokens of each row per FFN call, a power of two; None for all of them.

    Chunks save memory if the hidden units of the whole prompt are large: they are several times as wide as the states. All
    other intermediates of a layer are as wide as the states, or are made block by block (attention).

    Args:
        rows: rows of a batch on a device.
        slots: packed slots of a row.
        ffn_width: FFN units on a device.
        itemsize: bytes of a number.
    """
    tokens = max(1, max(LEAST_TOKENS, HIDDEN_BYTES // (ffn_width * itemsize)) // rows)
    chunk = 1 << (tokens.bit_length() - 1)
    return None if slots <= chunk else chunk


class DeployedPrograms(ModelPrograms):
    """Static programs over one model.

    Args:
        model: a family's module with `vision` and `decoder`, laid out on `mesh`.
        mesh: the devices, all of this process.
        seed: draws random probes.
        stop_token: the token that ends a turn.
        chunk: tokens of each row per FFN call in a prefill; None chooses by size.
    """

    def __init__(self, model: VisionLanguageModel, mesh: Mesh, *, seed: int, stop_token: int, chunk: int | None = None):
        super().__init__(model, mesh)
        self._seed = seed
        self._stop_token = stop_token
        self._chunk = chunk
        self._prefills: dict[tuple[Plan, Reduction, Pruning | None, int], Program] = {}
        self._decoders: dict[tuple[int, int, int], Program] = {}

    def prefill(self, visual: Float[Array, "B P D"], batch: PromptBatch, deployed: PlanFile, new_tokens: int) -> Prefilled:
        """Read all prompts of a batch, in a program for this plan alone; the caches have room for `new_tokens` tokens."""
        plan, reduction, pruning = deployed.plan, deployed.reduction, deployed.pruning
        key = plan, reduction, pruning, new_tokens
        if key not in self._prefills:

            def run(model: VisionLanguageModel, visual: Array, batch: PromptBatch) -> Prefilled:
                made = prefill(
                    model.decoder,
                    visual,
                    batch,
                    plan,
                    reduction,
                    new_tokens,
                    jax.random.key(self._seed),
                    self.kernel,
                    pruning,
                    self._chunk_of(model, batch),
                )
                return Prefilled(*made)

            self._prefills[key] = self.program(
                "prefill", run, (ROWS, ROWS), _partition(2 if isinstance(pruning, FastV | VTW) else 1)
            )
        return self._prefills[key](visual, batch)

    def decode(self, prefilled: Prefilled, batch: PromptBatch, new_tokens: int, *, to_the_end: bool = False) -> Int[Array, "B Y"]:
        """The greedy answers, in one program for all plans (paper: decoding is never reduced).

        Only pruning needs another program, because it leaves smaller caches.

        Args:
            prefilled: the result of `prefill` for `batch` and `new_tokens`.
            batch: the prompts.
            new_tokens: tokens to generate.
            to_the_end: generate all new tokens even if all answers have ended, for measurements.
        """
        stop_token, parts = _NO_TOKEN if to_the_end else self._stop_token, len(prefilled.caches)
        key = new_tokens, stop_token, parts
        if key not in self._decoders:

            def run(model: VisionLanguageModel, prefilled: Prefilled, batch: PromptBatch) -> Array:
                return decode(model.decoder, prefilled.first, prefilled.caches, batch, new_tokens, stop_token)

            self._decoders[key] = self.program("decode", run, (_partition(parts), ROWS), ROWS)
        return self._decoders[key](prefilled, batch)

    def _chunk_of(self, model: VisionLanguageModel, batch: PromptBatch) -> int | None:
        if self._chunk is not None:
            return self._chunk
        rows, units = batch.text_ids.shape[0], model.decoder.layers.ffn.gate_proj.kernel.shape[1]
        return automatic_chunk(rows, batch.layout.bucket.slots, units, self.dtype.itemsize)


def _partition(parts: int) -> Any:
    """The partition of a prefilled batch with `parts` caches over the mesh."""
    return unchecked(Prefilled, first=ROWS, caches=(_CACHE,) * parts, scored=ROWS)
