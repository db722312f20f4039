"""Published names of LLaVA-OneVision (the -hf repositories): `language_model.*`, `vision_tower.*` and so on.

Newer versions of transformers write `model.language_model.*` and `model.vision_tower.*`, and version 5 writes the tower with or
without its level `vision_model`.
"""

from dataclasses import replace

from rlens_jax.families.llava_onevision.model import LlavaOnevisionConfig
from rlens_jax.families.siglip import siglip_parts
from rlens_jax.families.table import EMBEDDING, HEAD, Ignored, Part, Row, Table, decoder_parts, linear, pattern_sizes

DECODER, TOWER = "language_model.", "vision_tower.vision_model."
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
    (r"^vision_tower\.(?!vision_model\.)", TOWER),
)


def table(config: LlavaOnevisionConfig) -> Table:
    """The mapping for a model of these sizes."""
    tower = TOWER.replace(".", r"\.")
    return Table(
        parts=(
            *(replace(part, source=DECODER + part.source) for part in decoder_parts(config.decoder)),
            *siglip_parts(config.vision, TOWER, "vision.tower."),
            Part(
                "",
                "vision.",
                pattern_sizes(config.sizes),
                (
                    *linear("multi_modal_projector.linear_1", "projector_fc1", "m e -> e m"),
                    *linear("multi_modal_projector.linear_2", "projector_fc2", "d m -> m d"),
                    Row("image_newline", "image_newline", "d -> d"),
                ),
            ),
        ),
        renames=RENAMES,
        ignored=(
            Ignored(tower + r"post_layernorm\..*", "visual tokens are made of the states before this norm"),
            Ignored(tower + r"head\..*", "pools an image into one vector, which visual tokens do not use"),
            Ignored(r".*\.(inv_freq|position_ids)", "follows from config.json"),
        ),
        copies={DECODER + HEAD: DECODER + EMBEDDING} if config.decoder.tied_head else None,
    )
