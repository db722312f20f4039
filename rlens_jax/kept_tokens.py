"""Baselines that choose visual tokens before the first layer, as immutable and hashable values.

A method keeps some of the connector's outputs of each sample, or makes fewer of them. So the whole prefill and the cache of all
layers shrink. All visual tokens of a sample compete. Survivors keep their order. A value out of range raises UserError.
"""

from dataclasses import dataclass, field
from math import isqrt
from typing import ClassVar, Literal, no_type_check

from rlens_jax.drops import Positions, Stage, check_positions, checked_keep, position_label
from rlens_jax.errors import UserError
from rlens_jax.files import quoted
from rlens_jax.plans import exact


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class Selection:
    """The budget of a method; each subclass is a method."""

    keep: int | float | str
    """T*: a whole number is a number of visual tokens of each sample, a decimal number a share of them, 0 < keep <= 1.

    So 1 is one token, and 1.0 is all. A share is rounded half to even, as DivPrune's code does; at least one token stays.
    """
    positions: Positions = field(default="kept", kw_only=True)
    """On LLaVA models the authors of DivPrune, CDPruner, FasterVLM and VisionZip renumber; with M-RoPE positions are kept."""

    title: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", checked_keep(f"{self.title}: keep", self.keep))
        check_positions(self.title, self.positions)

    def kept(self, num_visual: int) -> int:
        """Number of tokens left of a sample's `num_visual`."""
        count = self.keep if isinstance(self.keep, int) else max(1, round(num_visual * exact(self.keep)))
        return min(num_visual, count)

    def capacity(self, num_slots: int) -> int:
        """Static slots for the survivors of samples with at most `num_slots` visual tokens; one stays if there are none."""
        return max(1, *(self.kept(count) for count in range(num_slots + 1)))

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Where tokens are chosen."""
        return (Stage(0, self.kept),)

    def validate(self, num_layers: int) -> None:
        """Accept any number of layers."""

    def check_sample(self, name: str, num_visual: int) -> None:
        """Raise UserError, beginning with `name`, if the budget is too small for a sample of `num_visual` tokens."""

    def label(self) -> str:
        """A short text for tables and messages."""
        whole = isinstance(self.keep, int)
        amount = self.keep if whole else f"{100 * self.keep:g} % of the"
        return f"{self.title} keeps {amount} visual tokens{position_label(self.positions)}"


class RandomTokens(Selection):
    """Keep tokens drawn without replacement, by the seed of the run and the sample."""

    title = "random"


class StridedTokens(Selection):
    """Keep the ordinals floor(i P / T*), i = 0 ... T* - 1."""

    title = "strided"


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class Pooling(Selection):
    """Average each image's grid of tokens down to s x s, by adaptive averages; s is the largest whose tokens fit the budget.

    The budget of a sample is shared by its images, or tiles, in equal parts. Cell (i, j) is the mean of the rows from
    floor(i n / s) to before ceil((i + 1) n / s) and of such columns, n = `side`. It takes the place of the middle token of these.
    """

    side: int = 24
    """Tokens per side of an image's grid: 24 in LLaVA-1.5; 16 of each tile in InternVL."""

    title: ClassVar[str] = "pooling"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.side) is not int or not 1 <= self.side <= 1024:
            raise UserError(f"pooling: side must be a whole number from 1 to 1024, not {quoted(self.side)}")

    def images(self, num_visual: int) -> int:
        """Number of grids among `num_visual` tokens."""
        return num_visual // self.side**2

    def cells(self, num_visual: int) -> int:
        """s for a sample of `num_visual` tokens; 0 if its budget has no token for each of its images."""
        images = self.images(num_visual)
        return isqrt(super().kept(images * self.side**2) // images) if images else 0

    def kept(self, num_visual: int) -> int:
        """Number of tokens left of a sample's `num_visual`."""
        return self.images(num_visual) * self.cells(num_visual) ** 2

    def check_sample(self, name: str, num_visual: int) -> None:
        """Raise UserError, beginning with `name`, unless the budget has a token for each image."""
        images = self.images(num_visual)
        if images and not self.cells(num_visual):
            raise UserError(
                f"{name}: pooling leaves each of {images} images or tiles at least one token; keep {images} tokens or more"
            )


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class DivPrune(Selection):
    """Keep the tokens that differ most from each other (DivPrune, Alvar et al., arXiv 2503.02175)."""

    keep: int | float | str = 0.098
    """As `Selection.keep`; the default is that of the authors' code."""

    title: ClassVar[str] = "DivPrune"


class CDPruner(Selection):
    """Keep tokens that differ and have to do with the question (after CDPruner, Zhang et al., arXiv 2506.10967).

    The published method compares with embeddings of CLIP's text tower, which no family has. Here the question is the decoder's
    embeddings of its tokens, as in the public port to Qwen-VL; hence its name, `cdpruner-embeddings`.
    """

    title = "CDPruner (embeddings)"


class TowerSelection(Selection):
    """A method that looks at the attention in the vision tower: that of its class token, or what patches receive on average."""


class FasterVLM(TowerSelection):
    """Keep the tokens with most attention (FasterVLM, Zhang et al., arXiv 2412.01818)."""

    title = "FasterVLM"


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class VisionZip(TowerSelection):
    """Keep tokens with most attention, *dominant* ones; merge the others to *contextual* ones (Yang et al., arXiv 2412.04467).

    Of T* tokens floor(T* / 6.4) are contextual, as in the published splits 162 + 30, 108 + 20 and 54 + 10.
    """

    merge: Literal["sum", "mean"] = "sum"
    """How a token and the mean of those that are merged into it become one: their sum, as published, or half of it."""

    title: ClassVar[str] = "VisionZip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge not in ("sum", "mean"):
            raise UserError(f"VisionZip: merge must be 'sum' or 'mean', not {quoted(self.merge)}")

    def contextual(self, num_visual: int) -> int:
        """How many of the tokens left of `num_visual` are contextual."""
        return self.kept(num_visual) * 10 // 64
