"""Published names of the toy family."""

from rlens_jax.families.table import Part, Table, decoder_parts, linear
from tests.families.toy_family.model import COLOURS, ToyConfig


def table(config: ToyConfig) -> Table:
    sizes = {"c": COLOURS, "d": config.decoder.width}
    vision = Part("tower.", "vision.", sizes, linear("colours", "project", "d c -> c d"))
    return Table(parts=(*decoder_parts(config.decoder), vision))
