"""What the LLaVA families share: a connector of two linear maps, and the published names (the -hf repositories).

Published are `language_model.*`, `vision_tower.vision_model.*`, `multi_modal_projector.*` and `image_newline`. Newer versions of
transformers write `model.language_model.*` and `model.vision_tower.*`, and version 5 writes the tower with or without its level
`vision_model`.
"""

from dataclasses import replace

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.siglip import TowerConfig
from rlens_jax.families.table import EMBEDDING, HEAD, Ignored, Part, Row, Table, decoder_parts, linear
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.layers import Linear

DECODER, TOWER = "language_model.", "vision_tower.vision_model."
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
    (r"^vision_tower\.(?!vision_model\.)", TOWER),
)
NEWLINE_ROW = Row("image_newline", "image_newline", "d -> d")


def require_projector(config: ConfigReader) -> None:
    """Raise UserError if config.json asks for another connector."""
    config.require("projector_hidden_act", "gelu")
    config.require("multimodal_projector_bias", True)


class Projector(nnx.Module):
    """Two linear maps with biases and GELU between them, from the width of a tower to that of the decoder."""

    def __init__(self, width: int, out_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes = {"E": width, "m": out_width, "D": out_width}
        self.projector_fc1 = Linear("IJE,Em->IJm", sizes, bias="m", dtype=dtype, rngs=rngs)
        self.projector_fc2 = Linear("IJm,mD->IJD", sizes, bias="D", dtype=dtype, rngs=rngs)

    def project(self, x: Float[Array, "v J E"]) -> Float[Array, "v J D"]:
        """Apply the connector."""
        return self.projector_fc2(jax.nn.gelu(self.projector_fc1(x), approximate=False))


def llava_table(
    decoder: DecoderConfig, vision: TowerConfig, tower: tuple[Part, ...], unused: tuple[Ignored, ...], *more: Row
) -> Table:
    """The mapping of a model whose tower has the rows `tower` and the tensors `unused`, and which has `more` rows beside them."""
    connector = (
        *linear("multi_modal_projector.linear_1", "projector_fc1", "m e -> e m"),
        *linear("multi_modal_projector.linear_2", "projector_fc2", "d m -> m d"),
    )
    return Table(
        parts=(
            *(replace(part, source=DECODER + part.source) for part in decoder_parts(decoder)),
            *tower,
            Part("", "vision.", {"e": vision.width, "m": decoder.width, "d": decoder.width}, (*connector, *more)),
        ),
        renames=RENAMES,
        ignored=(*unused, Ignored(r".*\.(inv_freq|position_ids)", "follows from config.json")),
        copies={DECODER + HEAD: DECODER + EMBEDDING} if decoder.tied_head else None,
    )
