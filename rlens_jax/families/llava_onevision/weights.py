"""Published names of LLaVA-OneVision (the -hf repositories): `language_model.*`, `vision_tower.*` and so on.

transformers writes these or, newer, `model.language_model.*`, `model.vision_tower.*`, and from version 5 the tower with or
without its level `vision_model`.
"""

from dataclasses import replace

from rlens_jax.families.decoder_weights import EMBEDDING, HEAD, decoder_parts
from rlens_jax.families.llava_onevision.model import LlavaOnevisionConfig
from rlens_jax.families.siglip_weights import siglip_parts
from rlens_jax.families.table import Ignored, Part, Row, Table

DECODER, TOWER = "language_model.", "vision_tower.vision_model."
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
    (r"^vision_tower\.(?!vision_model\.)", TOWER),
)


def table(config: LlavaOnevisionConfig) -> Table:
    """The mapping for a model of these sizes."""
    sizes = {letter.lower(): size for letter, size in config.sizes.items()}
    tower = TOWER.replace(".", r"\.")
    return Table(
        parts=(
            *(replace(part, source=DECODER + part.source) for part in decoder_parts(config.decoder)),
            *siglip_parts(config.vision, TOWER, "vision.tower."),
            Part(
                "",
                "vision.",
                sizes,
                (
                    Row("multi_modal_projector.linear_1.weight", "projector_fc1.kernel", "m e -> e m"),
                    Row("multi_modal_projector.linear_1.bias", "projector_fc1.bias", "m -> m"),
                    Row("multi_modal_projector.linear_2.weight", "projector_fc2.kernel", "d m -> m d"),
                    Row("multi_modal_projector.linear_2.bias", "projector_fc2.bias", "d -> d"),
                    Row("image_newline", "image_newline", "d -> d"),
                ),
            ),
        ),
        renames=RENAMES,
        ignored=(
            Ignored(tower + r"post_layernorm\..*", "visual tokens are made of the states before this norm"),
            Ignored(tower + r"head\..*", "pools an image into one vector, which no visual token is made of"),
            Ignored(r".*\.(inv_freq|position_ids)", "follows from config.json"),
        ),
        copies={DECODER + HEAD: DECODER + EMBEDDING} if config.decoder.tied_head else None,
    )
