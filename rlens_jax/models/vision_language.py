"""The whole model: a vision module makes visual tokens, and the decoder reads them together with the text."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float

from rlens_jax.models.decoder import Decoder, DecoderConfig


@runtime_checkable
class TowerConfig(Protocol):
    """Sizes of a vision tower, as far as all families have them."""

    @property
    def depth(self) -> int:
        """Number of layers."""


@runtime_checkable
class FamilyConfig(Protocol):
    """Sizes and constants of a model, as far as all families have them."""

    @property
    def decoder(self) -> DecoderConfig: ...

    @property
    def vision(self) -> TowerConfig: ...


class VisionLanguageModel(nnx.Module):
    """A model of any family.

    Attributes:
        vision: from the arrays of prepared images (`PreparedImage`, stacked) to their visual tokens, padded.
        decoder: from text and visual tokens to logits.
    """

    def __init__(self, vision: Callable[..., Float[Array, "I Z D"]], decoder: Decoder):
        self.vision = vision
        self.decoder = decoder
