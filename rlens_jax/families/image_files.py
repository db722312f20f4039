"""What a model folder says about images: the fields of its image processor, and transformers' processor made of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rlens_jax.errors import UserError, foreign
from rlens_jax.files import quoted, read_json_object

PROCESSOR_FILE = "preprocessor_config.json"
NESTED_FILE = "processor_config.json"
MOST_TILES = 128
"""Tiles of an image: four times as many as any published model has. The search for a grid takes the square of them."""
MOST_PIXELS = 2**27
"""Pixels per view or limit of pixels, ten times those of any published model."""

Processor = TypeVar("Processor")


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _size(value: Any) -> bool:
    return _number(value) and value == int(value) and 0 < value <= MOST_PIXELS


def _three(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_number, value))


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "truth": (_truth, "true or false"),
    "size": (_size, f"a whole number from 1 to {MOST_PIXELS}"),
    "tiles": (lambda value: _size(value) and value <= MOST_TILES, f"a whole number from 1 to {MOST_TILES}"),
    "scale": (lambda value: _number(value) and value > 0, "a positive number"),
    "filter": (lambda value: _number(value) and value in range(6), "the number of a filter of Pillow, 0 to 5"),
    "three": (_three, "three numbers"),
    "positive three": (lambda value: _three(value) and min(value) > 0, "three positive numbers"),
    "sizes": (
        lambda value: isinstance(value, Mapping) and bool(value) and all(map(_size, value.values())),
        f"an object of whole numbers from 1 to {MOST_PIXELS}",
    ),
    "pairs": (
        lambda value: (
            isinstance(value, list)
            and 0 < len(value) <= MOST_TILES
            and all(isinstance(pair, list) and len(pair) == 2 and all(map(_size, pair)) for pair in value)
        ),
        f"a list of at most {MOST_TILES} pairs of whole numbers",
    ),
}
_FIELDS = {
    "truth": ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad", "do_center_crop", "crop_to_patches"),
    "size": ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"),
    "tiles": ("min_patches", "max_patches"),
    "scale": ("rescale_factor",),
    "filter": ("resample",),
    "three": ("image_mean", "norm_mean"),
    "positive three": ("image_std", "norm_std"),
    "sizes": ("size", "crop_size", "pad_size"),
    "pairs": ("image_grid_pinpoints",),
}
_OPTIONAL = frozenset((*_FIELDS["truth"], *_FIELDS["sizes"], "min_pixels", "max_pixels"))
"""Fields that may be null, which transformers takes as false or as the default."""
_KIND_OF = {name: kind for kind, names in _FIELDS.items() for name in names}


def read_processor_fields(folder: Path) -> tuple[dict[str, Any], str]:
    """The fields of a folder's image processor, and the file that has them.

    transformers saves them in processor_config.json, whose nested object wins, or in preprocessor_config.json.

    Raises:
        UserError: a file is missing, is not a JSON object, or has a field of the wrong type.
    """
    where, fields = str(folder / PROCESSOR_FILE), None
    if (folder / NESTED_FILE).exists():
        fields = read_json_object(folder / NESTED_FILE).get("image_processor")
        if fields is not None:
            where = f"{folder / NESTED_FILE}: image_processor"
    if fields is None and not (folder / PROCESSOR_FILE).exists():
        raise UserError(f"{folder}: no {PROCESSOR_FILE}; copy that of the published model beside config.json")
    if fields is None:
        fields = read_json_object(folder / PROCESSOR_FILE)
    if not isinstance(fields, dict):
        raise UserError(f"{where}: must be an object, not {quoted(fields)}")
    for name in fields.keys() & _KIND_OF.keys():
        fits, wanted = _KINDS[_KIND_OF[name]]
        if not fits(fields[name]) and not (fields[name] is None and name in _OPTIONAL):
            raise UserError(f"{where}: {name} must be {wanted}, not {quoted(fields[name])}")
    return fields, where


def make_processor(kind: Callable[..., Processor], fields: Mapping[str, Any], where: str) -> Processor:
    """An image processor of transformers with these fields; UserError, beginning with `where`, if it refuses them."""
    with foreign(f"{where}: no usable image processor", "; copy the file of the published model"):
        return kind(**fields)
