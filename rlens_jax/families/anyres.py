"""Images of any resolution as a base view and tiles, as LLaVA-OneVision and LLaVA-NeXT see them.

An image is seen as a whole (the base view) and, scaled to the best of the allowed resolutions (pinpoints), as square tiles. The
visual tokens of the tiles form one grid, without the rows and columns of padding, and a newline follows each row of the grid
(Hugging Face's `pack_image_features`). So all visual tokens of an image come from one table: the newline, then the patches of
all views.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import MOST_PIXELS, ConfigReader
from rlens_jax.families.image_files import make_processor, read_processor_fields
from rlens_jax.families.reference_inputs import checked
from rlens_jax.files import quoted
from rlens_jax.models.prompt import Grid

NEWLINE = 0
"""Row of the newline in the table from which visual tokens are taken; patch p of view v is row 1 + v J + p."""
MOST_PINPOINTS = 1 << 8


def read_pinpoints(config: ConfigReader, image_size: int, default: Sequence[Sequence[int]]) -> tuple[Grid, ...]:
    """The resolutions to which an image may be scaled, height and width in pixels. UserError if tiles do not fill one."""
    pinpoints = config.fields.get("image_grid_pinpoints")
    if pinpoints is None:
        pinpoints = default
    if not isinstance(pinpoints, list) or not 0 < len(pinpoints) <= MOST_PINPOINTS:
        raise config.error("image_grid_pinpoints", f"must be a list of 1 to {MOST_PINPOINTS} pairs [height, width]", pinpoints)
    sides = range(image_size, MOST_PIXELS + 1, image_size)
    for size in pinpoints:
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side in sides for side in size)):
            raise UserError(
                f"{config.where}: image_grid_pinpoints contains {quoted(size)}; only [height, width] in multiples of "
                f"the vision tower's image_size, {image_size}, up to {MOST_PIXELS} are supported"
            )
    return tuple((height, width) for height, width in pinpoints)


def best_tiles(image_size: Grid, pinpoints: Sequence[Grid], view: int) -> Grid:
    """Rows and columns of tiles of `view` pixels a side, for an image of this height and width."""
    # Imported here: where torchvision is installed this import loads it, and a model without images needs neither.
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(image_size, pinpoints)
    return height // view, width // view


def base_rows(side: int) -> np.ndarray:
    """Rows of the table that are the visual tokens of a base view with `side` patches per side, int32 [J]."""
    return 1 + np.arange(side**2, dtype=np.int32)


def tile_rows(image_size: Grid, tiles: Grid, side: int) -> np.ndarray:
    """Rows of the table that are the patches of the tiles, int [rows, columns], without padding.

    `image_size` is (height, width) in pixels before any scaling, `tiles` (rows, columns), `side` in patches per tile.
    """
    row, column = np.ogrid[: tiles[0] * side, : tiles[1] * side]
    view = 1 + (row // side) * tiles[1] + column // side
    return unpadded(1 + view * side**2 + (row % side) * side + column % side, image_size)


def unpadded(grid: np.ndarray, image_size: Grid) -> np.ndarray:
    """The middle of a grid [rows, columns] that an image of this size (in pixels) fills, without its padding."""
    height, width = image_size
    rows, columns = grid.shape
    # The same floating-point expressions as in transformers, because rounding decides.
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[padding : rows - padding]
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, padding : columns - padding]


def cut_patches(views: np.ndarray, patch_size: int) -> np.ndarray:
    """Views [v, 3, h, w] as patches [v, J, c], each in (channel, row, column) order, without incomplete patches."""
    count, channels, *shape = views.shape
    rows, columns = (side // patch_size for side in shape)
    whole = views[:, :, : rows * patch_size, : columns * patch_size]
    whole = whole.reshape(count, channels, rows, patch_size, columns, patch_size)
    return whole.transpose(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, -1)


def tile_processor(folder: Path, kind: Callable[..., Any], pinpoints: Sequence[Grid], view: int) -> Any:
    """The image processor of a folder, of this kind of transformers. UserError if it cuts other tiles than config.json says."""
    fields, where = read_processor_fields(folder)
    processor = make_processor(kind, fields, where)
    given = tuple((height, width) for height, width in processor.image_grid_pinpoints)
    sizes = [size for size in (processor.size, processor.crop_size) if size]
    sides = {side for size in sizes for side in (size.height, size.width, size.shortest_edge) if side is not None}
    if given != tuple(pinpoints) or sides != {view}:
        raise UserError(
            f"{where} and config.json differ in image_grid_pinpoints or in the size of a view; take both from one checkpoint"
        )
    return processor


def read_views(where: str, tensors: Mapping[str, np.ndarray], channels: int, view: int) -> tuple[np.ndarray, list[Grid]]:
    """Padded views [I, views, channels, view, view] of a parity bundle, and heights and widths of the I images.

    Raises:
        UserError: they do not fit each other; the error begins with `where`.
    """
    sizes = checked(where, tensors, "image_sizes", ("I", 2)).astype(np.int64)
    pixels = checked(where, tensors, "pixel_values", ("I", "views", channels, view, view))
    if len(sizes) != len(pixels):
        raise UserError(f"{where}: pixel_values has {len(pixels)} images where image_sizes has {len(sizes)}")
    if (sizes < 1).any():
        raise UserError(f"{where}: image_sizes must be heights and widths in pixels, not {sizes.min()}")
    return pixels, [(int(height), int(width)) for height, width in sizes]


def real_views(where: str, number: int, views: np.ndarray, count: int, image_size: Grid) -> np.ndarray:
    """The `count` views of an image of this size, without padding. UserError if there are others."""
    if count > len(views) or views[count:].any():
        filled = np.flatnonzero(views.any(axis=(1, 2, 3)))
        raise UserError(
            f"{where}: image {number} has {int(filled.max(initial=-1)) + 1} views in pixel_values, "
            f"{count} by its image_sizes {list(image_size)} (height, width)"
        )
    return views[:count]
