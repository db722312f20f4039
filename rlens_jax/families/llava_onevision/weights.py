"""Published names of LLaVA-OneVision (the -hf repositories), see `projector`."""

from rlens_jax.families.llava_onevision.model import LlavaOnevisionConfig
from rlens_jax.families.projector import NEWLINE_ROW, TOWER, llava_table
from rlens_jax.families.siglip import siglip_parts
from rlens_jax.families.table import Ignored, Table


def table(config: LlavaOnevisionConfig) -> Table:
    """The mapping for a model of these sizes."""
    tower = TOWER.replace(".", r"\.")
    unused = (
        Ignored(tower + r"post_layernorm\..*", "visual tokens are made of the states before this norm"),
        Ignored(tower + r"head\..*", "pools an image into one vector, which visual tokens do not use"),
    )
    return llava_table(config.decoder, config.vision, siglip_parts(config.vision, TOWER, "vision.tower."), unused, NEWLINE_ROW)
