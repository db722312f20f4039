"""Measure the padding that the presets' static buckets cost: `python benchmarks/bucket_padding.py`.

Prints, per preset, the share of slots that hold padding: for the decoder's visual tokens and for the vision tower's patches. The
image sizes go from phone screenshots to A4 scans, charts and infographics, with one image per prompt. No image is computed; it
takes a few seconds. Expect means of 2 to 20 % for the present presets; an image that fits no bucket ends it with an error.
"""

import sys
from pathlib import Path

import numpy as np

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.commands.options import read_config
from rlens_jax.console import say
from rlens_jax.families.internvl.preparer import closest_grid
from rlens_jax.families.llava_onevision.preparer import image_sources
from rlens_jax.families.minicpm_v.preparer import NO_SLICES, VIEW_STEP, Slicing

SIZES = (
    *((640, 480), (480, 640), (1024, 768), (500, 375), (1600, 1200)),  # photos
    *((1920, 1080), (1366, 768), (1080, 2340), (750, 1334)),  # screens
    *((1654, 2339), (2480, 3508), (850, 1100), (1700, 2200)),  # pages
    *((800, 600), (850, 600), (310, 620), (1000, 300)),  # charts
    *((800, 3000), (1000, 5000), (600, 1200), (300, 60)),  # infographics, a line of words
)
"""Width and height in pixels."""
LLAVA_ONEVISION = Path(__file__).with_name("models") / "llava_onevision_qwen2_7b_ov_hf"


def qwen2_vl(width: int, height: int) -> tuple[int, int]:
    """Visual tokens and patches, with the published bounds of the image size."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    sides = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=12845056)
    patches = (sides[0] // 14) * (sides[1] // 14)
    return patches // 4, patches


def llava_onevision(width: int, height: int) -> tuple[int, int]:
    """Visual tokens and patches of all views."""
    config = read_model_kind(LLAVA_ONEVISION).config
    sources, _, views = image_sources(config, (height, width), alone=True)
    return len(sources), config.side**2 * views


def internvl2(width: int, height: int) -> tuple[int, int]:
    """Visual tokens and patches of all tiles."""
    columns, rows = closest_grid(width, height, 448, 1, 12)
    tiles = columns * rows + (columns * rows > 1)
    return 256 * tiles, 1024 * tiles


def minicpm_v(width: int, height: int) -> tuple[int, int]:
    """Visual tokens, and patches of the largest view. Padding of the number of views to 1, 4, 7 or 10 is not counted."""
    black = np.zeros(3, np.float32)
    slicing = Slicing(9, 448, 14, black, black)
    grid = slicing.grid((width, height))
    sides = [slicing.view_size((width, height), enlarge=grid == NO_SLICES)]
    if grid != NO_SLICES:
        whole = slicing.sliced_size((width, height), grid)
        sides.append((whole[0] // grid[0], whole[1] // grid[1]))
    views = 1 + grid[0] * grid[1]
    assert views <= 1 + 3 * VIEW_STEP
    return 64 * views, max((w // 14) * (h // 14) for w, h in sides)


FAMILIES = {"qwen2_vl_7b": qwen2_vl, "llava_onevision_7b": llava_onevision, "internvl2_8b": internvl2, "minicpm_v_2_6": minicpm_v}


def main() -> None:
    """Count and print."""
    print(f"{'preset':<20}{'visual slots padded':>21}{'largest':>9}{'patch slots padded':>21}{'largest':>9}   buckets used")
    for name, count in FAMILIES.items():
        compute = read_config([("config", name)]).compute
        shares: tuple[list[float], list[float]] = [], []
        used = set()
        for width, height in SIZES:
            buckets = []
            for numbers, slots, number in zip(
                shares, (compute.visual_slots, compute.patch_slots), count(width, height), strict=True
            ):
                fitting = [size for size in slots if size >= number]
                if not fitting:
                    sys.exit(f"{name}: {width} x {height} has {number}, the largest bucket is {slots[-1]}")
                numbers.append(1 - number / fitting[0])
                buckets.append(fitting[0])
            used.add(tuple(buckets))
        visual, patches = (f"{np.mean(s):20.1%} {max(s):8.1%}" for s in shares)
        print(f"{name:<20}{visual}{patches}   {len(used)} of {len(compute.visual_slots)} x {len(compute.patch_slots)}")
    say(f"{len(SIZES)} image sizes, one image a prompt")


if __name__ == "__main__":
    main()
