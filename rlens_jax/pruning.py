"""Which visual tokens are pruned: FastV, VTW and FOLDER-style merging, as immutable and hashable values.

Methods that choose tokens before the first layer are those of `rlens_jax.kept_tokens`.

Pruning acts alone or on top of a `Plan`. Surviving tokens keep their order and their rotary positions and are renumbered, so
reduced layers see a packed sample like any other. A value out of range raises UserError.
"""

from dataclasses import dataclass
from typing import no_type_check

from rlens_jax.errors import UserError
from rlens_jax.files import quoted
from rlens_jax.kept_tokens import Selection
from rlens_jax.plans import checked_decimal, exact


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class FastV:
    """Drop a share of each sample's visual tokens after layer `layer` (FastV, Chen et al., arXiv 2403.06764).

    The first `layer` layers see all tokens. The tokens with the lowest attention from the prompt's last token are dropped.
    That attention is the last token's row of weights in layer `layer - 1` (0-based), averaged over the heads, as in the
    authors' code.
    """

    layer: int = 2
    """Number of layers that see all visual tokens, at least 1 (paper: 2)."""
    share: float | str = 0.5
    """Share of the tokens that is dropped, an exact decimal, 0 <= share < 1."""

    def __post_init__(self) -> None:
        _check_layer("FastV", self.layer)
        object.__setattr__(self, "share", checked_decimal("FastV: share", self.share, "[0, 1)"))

    def kept(self, num_visual: int) -> int:
        """Number of tokens left of a sample's `num_visual`; does not fall as `num_visual` grows."""
        return _kept(num_visual, self.share)

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless a layer follows the pruning in a model of `num_layers`."""
        _check_layer_follows("FastV", self.layer, num_layers)

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"FastV after layer {self.layer} drops {100 * float(self.share):g} %"


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class VTW:
    """Drop all visual tokens after layer `layer` (Visual Tokens Withdrawal, Lin et al., arXiv 2405.05803)."""

    layer: int
    """Number of layers that see the visual tokens, at least 1."""

    def __post_init__(self) -> None:
        _check_layer("VTW", self.layer)

    def kept(self, num_visual: int) -> int:
        """No visual token is left."""
        return 0

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless a layer follows the pruning in a model of `num_layers`."""
        _check_layer_follows("VTW", self.layer, num_layers)

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"VTW after layer {self.layer}"


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
        return _kept(num_visual, self.share)

    def validate(self, num_layers: int) -> None:
        """Accept any number of layers."""

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"FOLDER-style merging of {100 * float(self.share):g} %"


Pruning = FastV | VTW | Folder | Selection


def _kept(num_visual: int, share: float | str) -> int:
    # Rounded down as in FastV's code. Each sample keeps at least one token (our decision).
    return min(num_visual, max(1, num_visual * (1 - exact(share)) // 1))


def _check_layer(method: str, layer: object) -> None:
    if type(layer) is not int or layer < 1:
        raise UserError(f"{method}: layer must be a whole number, at least 1, not {quoted(layer)}")


def _check_layer_follows(method: str, layer: int, num_layers: int) -> None:
    if layer >= num_layers:
        raise UserError(
            f"{method} prunes after layer {layer}, but the model has {num_layers} layers; choose 1 to {num_layers - 1}"
        )
