"""Published names of LLaVA-1.5 (the -hf repositories), see `projector`."""

from rlens_jax.families.clip import clip_parts, clip_unused
from rlens_jax.families.llava.model import LlavaConfig
from rlens_jax.families.projector import TOWER, llava_table
from rlens_jax.families.table import Row, Table


def table(config: LlavaConfig, *more: Row) -> Table:
    """The mapping for a model of these sizes, with `more` rows beside those of tower and connector."""
    unused = clip_unused(config.vision, TOWER.replace(".", r"\."))
    return llava_table(config.decoder, config.vision, clip_parts(config.vision, TOWER, "vision.tower."), unused, *more)
