"""Reference inputs of MiniCPM-V 2.6: those of its published code, with lists stacked.

pixel_values   float [v, 3, side, length]: the patches of each view next to each other, row by row, as the published
               processor makes them, padded on the right; length is a multiple of side
tgt_sizes      int [v, 2]: rows and columns of the patches of each view
image_bound    int [v, 3]: for each view, in order, its row of input_ids, its first token and the token after its last one
               (our form; the published code has a list of pairs per row)
"""

from collections.abc import Mapping, Sequence
from math import isqrt

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.minicpm_v.model import MiniCPMVConfig
from rlens_jax.families.minicpm_v.preparer import view_positions
from rlens_jax.families.reference_inputs import ReferenceInputs, Row, checked, plain_rows, zero_padded
from rlens_jax.models.prompt import ImageTokens, PreparedImage


def read_images(
    where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: MiniCPMVConfig
) -> list[Row]:
    """See `ReferenceInputs.read_images`."""
    bounds = checked(where, tensors, "image_bound", ("views", 3)).astype(np.int64)
    views = _views(where, tensors, config)
    if len(bounds) != len(views):
        raise UserError(f"{where}: image_bound has {len(bounds)} views where pixel_values has {len(views)}")
    masks = _visual_tokens(where, token_ids, bounds, config.resampler.num_queries)
    return plain_rows(where, token_ids, masks, views, "pixel_values", "views")


def _views(where: str, tensors: Mapping[str, np.ndarray], config: MiniCPMVConfig) -> list[PreparedImage]:
    """Each view as an image: the tower sees it alone."""
    side = config.vision.patch_size
    pixels = checked(where, tensors, "pixel_values", ("views", 3, side, "length"))
    grids = checked(where, tensors, "tgt_sizes", ("views", 2)).astype(np.int64)
    count, _, _, length = pixels.shape
    if len(grids) != count:
        raise UserError(f"{where}: pixel_values has {count} views where tgt_sizes has {len(grids)}")
    if length % side:
        raise UserError(f"{where}: pixel_values is {length} wide, which is no multiple of the patch, {side}")
    slots = length // side
    patches = pixels.reshape(count, 3, side, slots, side).transpose(0, 3, 1, 2, 4).reshape(count, slots, -1)
    views = []
    for number, ((rows, columns), values) in enumerate(zip(grids.tolist(), patches, strict=True)):
        real = rows * columns
        if rows < 1 or columns < 1 or real > slots:
            raise UserError(f"{where}: view {number} has tgt_sizes [{rows}, {columns}], pixel_values room for {slots} patches")
        ids, places = view_positions(rows, columns, isqrt(config.vision.num_positions))
        arrays = (values, zero_padded(ids, slots), zero_padded(places, slots), np.array(real, np.int32))
        views.append(PreparedImage(tuple(array[None] for array in arrays), ImageTokens(config.resampler.num_queries)))
    return views


def _visual_tokens(where: str, token_ids: Sequence[np.ndarray], bounds: np.ndarray, num_queries: int) -> list[np.ndarray]:
    """The visual tokens of each row, bool [T_i] each."""
    masks = [np.zeros(len(ids), bool) for ids in token_ids]
    last = (0, 0)
    for number, (row, start, stop) in enumerate(bounds.tolist()):
        here = f"{where}: image_bound {number} is [{row}, {start}, {stop}]"
        if not 0 <= row < len(token_ids):
            raise UserError(f"{here}; input_ids has {len(token_ids)} rows")
        if not 0 <= start <= stop <= len(token_ids[row]):
            raise UserError(f"{here}; row {row} has {len(token_ids[row])} tokens")
        if stop - start != num_queries:
            raise UserError(f"{here}; a view has {num_queries} tokens")
        if (row, start) < last:
            raise UserError(f"{here}; bounds must go row by row, and forward in each without overlap")
        masks[row][start:stop] = True
        last = (row, stop)
    return masks


REFERENCE = ReferenceInputs(("pixel_values", "tgt_sizes", "image_bound"), read_images)
