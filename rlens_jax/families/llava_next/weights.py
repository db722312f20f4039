"""Published names of LLaVA-NeXT: those of LLaVA-1.5, and the newline."""

from rlens_jax.families import llava
from rlens_jax.families.llava_next.model import LlavaNextConfig
from rlens_jax.families.projector import NEWLINE_ROW
from rlens_jax.families.table import Table


def table(config: LlavaNextConfig) -> Table:
    """The mapping for a model of these sizes."""
    return llava.weights.table(config, NEWLINE_ROW)
