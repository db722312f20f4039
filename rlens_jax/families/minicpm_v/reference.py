"""MiniCPM-V 2.6's inputs: those of its published code, whose lists are stacked here.

pixel_values   float [views, 3, patch, length]: each view's patches side by side, row by row, as the published processor
               gives them, padded on the right; length is a multiple of patch
tgt_sizes      int [views, 2]: rows and columns of a view's patches
image_bound    int [views, 3]: row of input_ids, and the first token of the view and the one after its last; ours, as
               published it is a list of pairs for each row. In the order of views.
"""

from collections.abc import Mapping, Sequence
from math import isqrt

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.minicpm_v.model import MiniCPMVConfig, view_positions
from rlens_jax.families.reference_rows import FamilyInputs, Row, checked, padded, plain_prompt, take_images
from rlens_jax.models.prompt import PreparedImage


def read(
    where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: MiniCPMVConfig
) -> list[Row]:
    """See `FamilyInputs.read`."""
    bounds = checked(where, tensors, "image_bound", ("views", 3)).astype(np.int64)
    views = _views(where, tensors, config)
    if len(bounds) != len(views):
        raise UserError(f"{where}: image_bound has {len(bounds)} views where pixel_values has {len(views)}")
    marked = _visual_tokens(where, token_ids, bounds, config.resampler.num_queries)
    rows, first = [], 0
    for number, (ids, is_visual) in enumerate(zip(token_ids, marked, strict=True)):
        own = take_images(where, number, int(is_visual.sum()), views, first)
        rows.append(Row(plain_prompt(ids, is_visual), own))
        first += len(own)
    return rows


def _views(where: str, tensors: Mapping[str, np.ndarray], config: MiniCPMVConfig) -> list[PreparedImage]:
    """Each view as an image of its own: the tower sees it alone."""
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
            raise UserError(
                f"{where}: view {number} has tgt_sizes [{rows}, {columns}], pixel_values room for {slots} patches"
            )
        ids, places = view_positions(rows, columns, isqrt(config.vision.num_positions))
        arrays = (values, padded(ids, slots), padded(places, slots), np.array(real, np.int32))
        views.append(PreparedImage(tuple(array[None] for array in arrays), config.resampler.num_queries))
    return views


def _visual_tokens(
    where: str, token_ids: Sequence[np.ndarray], bounds: np.ndarray, num_queries: int
) -> list[np.ndarray]:
    """Which tokens of each row are visual, bool [T_i] each."""
    marked = [np.zeros(len(ids), bool) for ids in token_ids]
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
        marked[row][start:stop] = True
        last = (row, stop)
    return marked


INPUTS = FamilyInputs(("pixel_values", "tgt_sizes", "image_bound"), read)
