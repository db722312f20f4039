"""A case of a bundle, read and checked against the model that is compared with it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.models.decoder import with_fraction
from rlens_jax.parity.bundle import EMBEDDINGS, KEPT, LOGITS, POSITIONS, STATES, Case, CaseFile, states_name
from rlens_jax.plans import SKIP, Operator


class ReferenceCase:
    """Inputs and results of a case, checked against the model `kind` in `folder`.

    Attributes:
        case: the entry of the manifest.
        inputs: the prompts and images.
        imposed: int [B, U], the kept units per layer, as far as the file has them.
        positions: per row, the compared positions: those in the file that are not padding.
        logits: float32 [sum of positions, V].
    """

    def __init__(self, case: Case, file: CaseFile, kind: ModelKind, folder: Path):
        self.case, self._file, self._sizes = case, file, kind.config.decoder
        try:
            case.plan.validate(self._sizes.num_layers)
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from None
        self.inputs = kind.family.reference.read(str(file.path), file.inputs, kind.config, folder)
        self._token_ids = file.inputs["input_ids"]
        self.imposed = self._read_kept_units()
        self._check_states()
        self.positions, self.logits = self._read_logits()

    @property
    def has_any_states(self) -> bool:
        """Whether the file has states of any layer."""
        return bool(self._file.layers(STATES))

    def states(self, layer: int, after: Operator) -> list[np.ndarray] | None:
        """States after the attention or the FFN of a layer, per row [T_i, D] without padding; None if the file lacks them."""
        return self._rows(states_name(layer, after))

    def embeddings(self) -> list[np.ndarray] | None:
        """States that enter the first layer, as `states`."""
        return self._rows(EMBEDDINGS)

    def _rows(self, name: str) -> list[np.ndarray] | None:
        if name not in self._file.names:
            return None
        states = self._file.read(name)
        return [row[: len(inputs.prompt.token_ids)] for row, inputs in zip(states, self.inputs, strict=True)]

    def same_tokens(self, other: "ReferenceCase") -> bool:
        """Whether two cases have the same `input_ids`."""
        return self._token_ids.tobytes() == other._token_ids.tobytes()

    def _shape_error(self, name: str, shape: Sequence[int], expected: str) -> UserError:
        return UserError(f"{self._file.path}: {name} has shape {list(shape)}, expected {expected}")

    def _read_logits(self) -> tuple[list[np.ndarray], np.ndarray]:
        file, (batch, length), vocabulary = self._file, self._token_ids.shape, self._sizes.vocabulary
        if file.dtype(LOGITS) != "F32":
            raise UserError(f"{file.path}: {LOGITS} has dtype {file.dtype(LOGITS)}, expected F32")
        logits, positions = file.read(LOGITS), np.broadcast_to(np.arange(length), (batch, length))
        if POSITIONS in file.names:
            positions = file.read(POSITIONS)
            if positions.ndim != 2 or len(positions) != batch:
                raise self._shape_error(POSITIONS, positions.shape, f"[{batch}, n]")
            if positions.min(initial=0) < 0 or positions.max(initial=0) >= length:
                raise UserError(f"{file.path}: {POSITIONS} has positions outside the sequence of {length} tokens")
        if logits.shape != (*positions.shape, vocabulary):
            expected = [*positions.shape, vocabulary]
            raise self._shape_error(LOGITS, logits.shape, f"{expected} by the model and the inputs")
        kept = [row < len(inputs.prompt.token_ids) for row, inputs in zip(positions, self.inputs, strict=True)]
        compared = np.concatenate([row[keep] for row, keep in zip(logits, kept, strict=True)])
        if not compared.size:
            raise UserError(f"{file.path}: all positions of {LOGITS} are padding")
        if not np.isfinite(compared).all():
            raise UserError(f"{file.path}: {LOGITS} holds NaN or infinite values")
        return [row[keep] for row, keep in zip(positions, kept, strict=True)], compared

    def _read_kept_units(self) -> dict[int, np.ndarray]:
        width, file, case = self._sizes.ffn_width, self._file, self.case
        numbers = {
            layer: with_fraction(case.reduction, level).kept_units(width)
            for layer, level in case.plan.reduced("ffn").items()
            if level != SKIP
        }
        kept = {}
        for name, layer in file.layers(KEPT).items():
            if layer not in numbers:
                raise UserError(f"{file.path}: {name} is present, but the plan chooses no FFN units in layer {layer}")
            units, expected = file.read(name), [len(self._token_ids), numbers[layer]]
            if list(units.shape) != expected or file.dtype(name)[0] not in "IU":
                raise self._shape_error(name, units.shape, f"integers {expected}")
            for row, inputs in zip(units, self.inputs, strict=True):
                wrong = row.min() < 0 or row.max() >= width or len(np.unique(row)) != len(row)
                if inputs.prompt.num_visual and wrong:
                    raise UserError(f"{file.path}: {name} names a unit twice or one outside 0 ... {width - 1}")
            kept[layer] = np.clip(units, 0, width - 1)
        missing = [layer for layer in numbers if layer not in kept]
        if missing and case.reduction.probe == "random":
            raise UserError(f"{file.path}: other frameworks draw other random probes, so kept_units.{missing[0]} is needed")
        return kept

    def _check_states(self) -> None:
        expected = (*self._token_ids.shape, self._sizes.width)
        states = self._file.layers(STATES) | ({EMBEDDINGS: 0} if EMBEDDINGS in self._file.names else {})
        for name, layer in states.items():
            if layer >= self._sizes.num_layers:
                raise UserError(f"{self._file.path}: {name} is of a layer that the model lacks")
            if self._file.shape(name) != expected:
                raise self._shape_error(name, self._file.shape(name), str(list(expected)))
