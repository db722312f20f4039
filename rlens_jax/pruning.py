"""Which visual tokens are pruned: FastV, VTW, FOLDER-style merging and others, as immutable and hashable values.

Methods that choose tokens before the first layer are those of `rlens_jax.kept_tokens`; others that drop tokens between layers are
those of `rlens_jax.drops`.

Pruning acts alone or on top of a `Plan`. Surviving tokens keep their order and, unless an option says otherwise, their rotary
positions; their ordinals count anew, so reduced layers see a packed sample like any other. A value out of range raises UserError.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, no_type_check

from rlens_jax.drops import (
    DART,
    Positions,
    PyramidDrop,
    SparseVLM,
    Stage,
    check_choice,
    check_count,
    check_layer,
    check_layer_follows,
    check_positions,
    position_label,
)
from rlens_jax.errors import UserError
from rlens_jax.kept_tokens import CDPruner, DivPrune, FasterVLM, Pooling, RandomTokens, Selection, StridedTokens, VisionZip
from rlens_jax.plans import checked_decimal, exact

Attention = Literal["last_token", "all_tokens"]


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class FastV:
    """Drop a share of each sample's visual tokens after layer `layer` (FastV, Chen et al., arXiv 2403.06764).

    The first `layer` layers see all tokens. The tokens with the lowest attention are dropped. That attention is the weights of
    layer `layer - 1` (0-based), averaged over the heads.
    """

    layer: int = 2
    """Number of layers that see all visual tokens, at least 1 (paper: 2; some later copies: 3)."""
    share: float | str | None = None
    """Share of the tokens that is dropped, an exact decimal, 0 <= share < 1; 0.5 without `keep`."""
    keep: int | None = None
    """In place of `share`: number of tokens that stay, as in the authors' code."""
    attention: Attention = "last_token"
    """`last_token`: the row of the prompt's last token, as in the authors' code. `all_tokens`: the mean over the rows of all
    tokens of the prompt, as in the paper's text; it costs a second attention of the whole layer."""
    positions: Positions = "kept"

    def __post_init__(self) -> None:
        check_layer("FastV", self.layer)
        if self.keep is None:
            share = 0.5 if self.share is None else self.share
            object.__setattr__(self, "share", checked_decimal("FastV: share", share, "[0, 1)"))
        elif self.share is not None:
            raise UserError("FastV: give either share, which is dropped, or keep, the number of tokens that stay")
        else:
            check_count("FastV: keep", self.keep)
        check_choice("FastV: attention", self.attention, get_args(Attention))
        check_positions("FastV", self.positions)

    def kept(self, num_visual: int) -> int:
        """Number of tokens left of a sample's `num_visual`; does not fall as `num_visual` grows."""
        if self.keep is not None:
            return min(self.keep, num_visual)
        assert self.share is not None
        return _left(num_visual, self.share)

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Where tokens are dropped."""
        return (Stage(self.layer, self.kept),)

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless a layer follows the pruning in a model of `num_layers`."""
        check_layer_follows("FastV", self.layer, num_layers)

    def label(self) -> str:
        """A short text for tables and messages."""
        left = f"keeps {self.keep} tokens" if self.share is None else f"drops {100 * float(self.share):g} %"
        by = "" if self.attention == "last_token" else ", by the attention of all tokens"
        return f"FastV after layer {self.layer} {left}{by}{position_label(self.positions)}"


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class VTW:
    """Drop all visual tokens after layer `layer` (Visual Tokens Withdrawal, Lin et al., arXiv 2405.05803)."""

    layer: int
    """Number of layers that see the visual tokens, at least 1."""
    positions: Positions = "kept"

    def __post_init__(self) -> None:
        check_layer("VTW", self.layer)
        check_positions("VTW", self.positions)

    def kept(self, num_visual: int) -> int:
        """No visual token is left."""
        return 0

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Where tokens are dropped."""
        return (Stage(self.layer, self.kept),)

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless a layer follows the pruning in a model of `num_layers`."""
        check_layer_follows("VTW", self.layer, num_layers)

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"VTW after layer {self.layer}{position_label(self.positions)}"


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class Folder:
    """Merge similar visual tokens before the first layer (after FOLDER, Wang et al., arXiv 2501.02430).

    FOLDER merges inside the vision tower's last blocks. Here the connector's outputs are merged, so that one program serves
    all families (our decision).
    """

    share: float | str = 0.5
    """Share of the tokens that is merged away, an exact decimal, 0 <= share < 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", checked_decimal("Folder: share", self.share, "[0, 1)"))

    def kept(self, num_visual: int) -> int:
        """Number of tokens left of a sample's `num_visual`; does not fall as `num_visual` grows."""
        return _left(num_visual, self.share)

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Where tokens are merged."""
        return (Stage(0, self.kept),)

    def validate(self, num_layers: int) -> None:
        """Accept any number of layers."""

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"FOLDER-style merging of {100 * float(self.share):g} %"


Pruning = FastV | VTW | Folder | PyramidDrop | SparseVLM | DART | Selection
METHODS: Mapping[str, type[Any]] = {
    "fastv": FastV,
    "vtw": VTW,
    "folder": Folder,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "dart": DART,
    "random": RandomTokens,
    "strided": StridedTokens,
    "pooling": Pooling,
    "divprune": DivPrune,
    "cdpruner-embeddings": CDPruner,
    "fastervlm": FasterVLM,
    "visionzip": VisionZip,
}
"""By the names that plan files give them."""


def decoder_stages(pruning: Pruning | None, num_layers: int) -> tuple[Stage, ...]:
    """The stages between layers of a model of `num_layers`. UserError if a layer of them does not exist."""
    if pruning is None:
        return ()
    pruning.validate(num_layers)
    return tuple(stage for stage in pruning.stages(num_layers) if stage.layer)


def pruning_fields(pruning: Pruning | None) -> dict[str, Any] | None:
    """The JSON value of a plan file; options that are not used are left out."""
    if pruning is None:
        return None
    (method,) = (name for name, kind in METHODS.items() if isinstance(pruning, kind))
    used = {name: value for name, value in asdict(pruning).items() if value is not None}
    return {"method": method, **{name: list(value) if isinstance(value, tuple) else value for name, value in used.items()}}


def _left(num_visual: int, share: float | str) -> int:
    # Rounded down as in FastV's code. Each sample keeps at least one token (our decision).
    return min(num_visual, max(1, num_visual * (1 - exact(share)) // 1))
