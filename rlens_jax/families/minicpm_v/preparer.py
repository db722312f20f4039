"""Images and prompts of a MiniCPM-V 2.6 checkpoint: adaptive slicing, and marks around the views in the prompt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL.Image import Image, Resampling
from transformers import PreTrainedTokenizerFast

from rlens_jax.data.benchmarks.catalogue import (
    ANSWER_LETTER,
    MMMU,
    SHORT_ANSWER,
    Instance,
    Turn,
    hint,
    options,
    question_and_options,
)
from rlens_jax.data.images import Transparency
from rlens_jax.data.samples import IMAGE_MARK, Sample
from rlens_jax.errors import UserError, foreign
from rlens_jax.families.chat_files import load_tokenizer, read_stop_tokens, read_template
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.image_files import MOST_TILES, PROCESSOR_FILE, read_processor_fields
from rlens_jax.families.minicpm_v.model import VERSION, MiniCPMVConfig
from rlens_jax.models.chat import Chat, Part, user_contents
from rlens_jax.models.prompt import Grid, ImageArrays, ImageSize, ImageTokens, Measure, PreparedImage, Prompt

VIEW_STEP = 3
"""Views are padded to 1, 4, 7 or 10: few shapes to compile, and little computed for padding (our decision)."""
MAX_SLICES = 9
"""Slices of an image if preprocessor_config.json has no `max_slice_nums` (9 in the published one)."""
MOST_RESOLUTION = 4096
"""Pixels per side of a view, nine times as many as published."""
NO_SLICES: Grid = (0, 0)

STEP_BY_STEP = (
    "Read the following question carefully, solve it step by step, and then output the final answer in the format of "
    '"Answer: single number or single word or phrase".\n\n'
)
# The quotation mark is never closed.
CHOICE_STEP_BY_STEP = (
    "Carefully read the following multichoice question, solve it step by step and finally pick the option associated with the "
    'correct answer in the format of "Answer: selected option\n\n'
)
STEP_BY_STEP_DATASETS = frozenset({"OCRBench", "ChartQA_TEST", "HallusionBench", MMMU})


def _float32_range(start: float, stop: float, step: float) -> np.ndarray:
    """The numbers of torch.arange in float32 on a CPU: blocks of 8, whose first number is rounded before steps are added.

    The last, incomplete block is not rounded in between. These roundings decide the bucket of a number near an edge.
    """
    index = np.arange(math.ceil((stop - start) / step))
    lane = np.where(index < len(index) // 8 * 8, index % 8, 0)
    first = (start + step * (index - lane)).astype(np.float32).astype(np.float64)
    return (first + step * lane).astype(np.float32)


def position_buckets(patches: int, side: int) -> np.ndarray:
    """Position of each of `patches` patches in a row on a trained axis of `side` positions, int [patches].

    Equal to the published rule: torch.bucketize of float32 fractions, whose step is itself rounded to float32.
    """
    edges = _float32_range(1 / side, 1.0, 1 / side)
    step = float(np.float32(1) / np.float32(patches))
    return np.searchsorted(edges, _float32_range(0.0, 1 - 1e-6, step), side="right")


def view_positions(rows: int, columns: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a position table of `side` x `side`, int32 [J], and places, int32 [J, 2], of the patches of a view, row by row."""
    ids = position_buckets(rows, side)[:, None] * side + position_buckets(columns, side)
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    return ids.reshape(-1).astype(np.int32), places.reshape(-1, 2).astype(np.int32)


@dataclass(frozen=True)
class Slicing:
    """Cuts images into views as preprocessor_config.json says. Sizes are (width, height) in pixels."""

    max_slices: int
    resolution: int
    """Side of the square that has about the area of a view."""
    patch_size: int
    mean: np.ndarray
    std: np.ndarray
    """Mean and standard deviation per channel, float32 [3]."""

    def grid(self, size: tuple[int, int]) -> Grid:
        """Columns and rows of the slices of an image; `NO_SLICES` if it is small enough for one view."""
        width, height = size
        ideal = min(math.ceil(width * height / self.resolution**2), self.max_slices)
        if ideal <= 1:
            return NO_SLICES
        shape = math.log(width / height)
        grids = [
            (columns, slices // columns)
            for slices in (ideal - 1, ideal, ideal + 1)
            if 1 < slices <= self.max_slices
            for columns in range(1, slices + 1)
            if slices % columns == 0
        ]
        return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))

    def view_size(self, size: tuple[float, float], enlarge: bool) -> tuple[int, int]:
        """The size of a view, in whole patches; a small one keeps its area unless `enlarge`."""
        width, height = size
        if enlarge or width * height > self.resolution**2:
            shape = width / height
            height = int(self.resolution / math.sqrt(shape))
            width = int(height * shape)
        return _nearest_multiple(width, self.patch_size), _nearest_multiple(height, self.patch_size)

    def sliced_size(self, size: tuple[int, int], grid: Grid) -> tuple[int, int]:
        """The size of the image if each cell of the grid is one view."""
        cell = [_nearest_multiple(length, count) / count for length, count in zip(size, grid, strict=True)]
        width, height = self.view_size((cell[0], cell[1]), enlarge=True)
        return width * grid[0], height * grid[1]

    def views(self, image: Image) -> tuple[list[Image], Grid]:
        """The whole image followed by its slices row by row, and the grid of the slices."""
        grid = self.grid(image.size)
        views = [image.resize(self.view_size(image.size, enlarge=grid == NO_SLICES), Resampling.BICUBIC)]
        if grid != NO_SLICES:
            large = image.resize(self.sliced_size(image.size, grid), Resampling.BICUBIC)
            width, height = large.width // grid[0], large.height // grid[1]
            views += [
                large.crop((left, top, left + width, top + height))
                for top in range(0, large.height, height)
                for left in range(0, large.width, width)
            ]
        return views, grid

    def patches(self, view: Image) -> np.ndarray:
        """Normalised pixels of each patch, row by row: float32 [J, c], a patch as (channel, row, column)."""
        pixels = (np.asarray(view, np.float32) / np.float32(255) - self.mean) / self.std
        side = self.patch_size
        blocks = pixels.reshape(view.height // side, side, view.width // side, side, 3)
        return blocks.transpose(0, 2, 4, 1, 3).reshape(-1, 3 * side**2)


def _nearest_multiple(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)


def read_slicing(fields: ConfigReader, config: MiniCPMVConfig) -> Slicing:
    """Read the slicing from preprocessor_config.json; UserError if it does not fit the model."""
    fields.require("version", VERSION)
    fields.require("slice_mode", True)
    fields.require("image_feature_size", config.resampler.num_queries)
    fields.require("patch_size", config.vision.patch_size)
    mean, std = (fields.fields.get(name, [0.5, 0.5, 0.5]) for name in ("norm_mean", "norm_std"))
    max_slices, resolution = fields.size("max_slice_nums", default=MAX_SLICES), fields.size("scale_resolution", default=448)
    if max_slices > MOST_TILES or not config.vision.patch_size <= resolution <= MOST_RESOLUTION:
        raise UserError(
            f"{fields.where}: max_slice_nums {max_slices} and scale_resolution {resolution} must be at most {MOST_TILES} and "
            f"from {config.vision.patch_size} to {MOST_RESOLUTION}"
        )
    return Slicing(
        max_slices=max_slices,
        resolution=resolution,
        patch_size=config.vision.patch_size,
        mean=np.array(mean, np.float32),
        std=np.array(std, np.float32),
    )


@dataclass(frozen=True)
class Marks:
    """Texts of special tokens around and inside an image, as in preprocessor_config.json."""

    image: tuple[str, str]
    slice: tuple[str, str]
    image_id: tuple[str, str]
    slot: str
    """Placeholder of a visual token. It is also the unknown token, so slots are found by the tokens around them."""
    use_image_id: bool

    def text(self, number: int, grid: Grid, num_queries: int) -> str:
        """The text of image `number` in the prompt: all its views, with a line per row of slices."""
        slots = self.slot * num_queries
        text = slots.join(self.image)
        if self.use_image_id:
            text = str(number).join(self.image_id) + text
        columns, rows = grid
        return text + "\n".join([slots.join(self.slice) * columns] * rows)


def read_marks(fields: ConfigReader) -> Marks:
    """Read the marks from preprocessor_config.json; missing ones have the published values."""

    def text(name: str, default: str) -> str:
        value = fields.fields.get(name, default)
        if not isinstance(value, str) or not value:
            raise UserError(f"{fields.where}: {name} must be a text, not {value!r}")
        return value

    def pair(start: str, end: str, default: str) -> tuple[str, str]:
        return text(start, f"<{default}>"), text(end, f"</{default}>")

    return Marks(
        image=pair("im_start", "im_end", "image"),
        slice=pair("slice_start", "slice_end", "slice"),
        image_id=pair("im_id_start", "im_id_end", "image_id"),
        slot=text("unk", "<unk>"),
        use_image_id=fields.require("use_image_id", True, False),
    )


class SlicedChat(Chat):
    """A chat whose prompts have text inside images."""

    def __init__(self, folder: Path, marks: Marks, num_queries: int, vocabulary: int):
        # Not AutoTokenizer: tokenizer_config.json names a class that is code of the checkpoint.
        tokenizer = load_tokenizer(PreTrainedTokenizerFast, folder)
        tokenizer.chat_template = read_template(folder, tokenizer)
        super().__init__(tokenizer, vocabulary, read_stop_tokens(folder, tokenizer, vocabulary))
        self.marks = marks
        self.num_queries = num_queries
        for token in (*marks.image, *marks.slice, marks.slot):
            if self.ids(token) != [self.tokenizer.convert_tokens_to_ids(token)]:
                raise UserError(f"{folder}: the tokenizer has no token {token!r}; copy the files of MiniCPM-V 2.6")
        starts, ends = zip(marks.image, marks.slice, strict=True)
        self.starts, self.ends = (self.tokenizer.convert_tokens_to_ids(list(tokens)) for tokens in (starts, ends))

    def encode(self, sample: Sample, grids: Sequence[Grid], answer: str | None) -> tuple[np.ndarray, np.ndarray, int]:
        """Token ids of a sample, followed by `answer` and the end of the turn unless it is None.

        `grids` are columns and rows of the slices of each image.

        Returns:
            The token ids, int32 [T], which of them are visual, bool [T], and how many are the answer and the end of the turn.

        Raises:
            UserError: as `turn`, or the template loses marks of images.
        """
        images = iter([self.marks.text(i, grid, self.num_queries) for i, grid in enumerate(grids)])
        between = "" if sample.marked else "\n"

        def write(parts: list[Part]) -> str:
            """Images at their marks, or each on its own line before the text, as in the published `chat`."""
            return between.join(next(images) if part["type"] == "image" else part["text"] for part in parts)

        ids, num_answer = self.turn(sample, user_contents(sample), answer, write)
        token_ids = np.array(ids, np.int32)
        starts = np.flatnonzero(np.isin(token_ids, self.starts)) + 1
        ends = np.flatnonzero(np.isin(token_ids, self.ends))
        num_views = sum(1 + math.prod(grid) for grid in grids)
        if not len(starts) == len(ends) == num_views or (ends - starts != self.num_queries).any():
            raise UserError(
                f"{sample.id}: the chat template changes the marks of images; copy the chat template of the published model"
            )
        is_visual = np.zeros(len(token_ids), bool)
        for start, end in zip(starts, ends, strict=True):
            is_visual[start:end] = True
        return token_ids, is_visual, num_answer


def image_sizes(config: MiniCPMVConfig, patches: int) -> list[ImageSize]:
    """See `Family.image_sizes`: 1, 4, 7 or 10 views with so many patches each."""
    return [(views, patches) for views in range(1, 2 + MAX_SLICES, VIEW_STEP)]


def image_arrays(config: MiniCPMVConfig, size: ImageSize) -> ImageArrays:
    """See `Family.image_arrays`."""
    return [((*size, config.vision.sizes["c"]), jnp.float32), (size, jnp.int32), ((*size, 2), jnp.int32), (size[:1], jnp.int32)]


def measure(config: MiniCPMVConfig, fields: Mapping[str, Any]) -> Measure:
    """See `Family.measure`."""
    published = {
        "version": VERSION,
        "slice_mode": True,
        "image_feature_size": config.resampler.num_queries,
        "patch_size": config.vision.patch_size,
    }
    limit = {"max_slice_nums": fields["max_slices"]} if "max_slices" in fields else {}
    slicing = read_slicing(ConfigReader({**published, **fields, **limit}, PROCESSOR_FILE), config)

    def measured(width: int, height: int) -> tuple[ImageSize, ImageTokens]:
        grid = slicing.grid((width, height))
        sizes = [slicing.view_size((width, height), enlarge=grid == NO_SLICES)]
        if grid != NO_SLICES:
            whole = slicing.sliced_size((width, height), grid)
            sizes.append((whole[0] // grid[0], whole[1] // grid[1]))
        views, largest = 1 + math.prod(grid), max(w * h for w, h in sizes) // slicing.patch_size**2
        return (views, largest), ImageTokens(views * config.resampler.num_queries, grid)

    return measured


class MiniCPMVPreparer:
    """See `Preparer`; of `limits`, max_slices takes the place of the folder's max_slice_nums."""

    def __init__(self, folder: Path, config: MiniCPMVConfig, limits: Mapping[str, int] = MappingProxyType({})):
        own, where = read_processor_fields(folder)
        most = limits.get("max_slices", 0)
        if most > MAX_SLICES:
            raise UserError(f"max_slices must be from 1 to {MAX_SLICES}, not {most}")
        fields = ConfigReader({**own, "max_slice_nums": most} if most else own, where)
        self.config = config
        self.transparency: Transparency = "dropped"
        self.slicing = read_slicing(fields, config)
        self.chat = SlicedChat(folder, read_marks(fields), config.resampler.num_queries, config.decoder.vocabulary)

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[PreparedImage]:
        """Each image as the arrays of `VisionTower`, without the axis of images."""
        return [self._image(image, sample_id) for image in pixels]

    def _image(self, pixels: Image, sample_id: str) -> PreparedImage:
        with foreign(f"{sample_id}: an image of {pixels.width} x {pixels.height} pixels cannot be prepared"):
            views, grid = self.slicing.views(pixels)
            patches = [self.slicing.patches(view) for view in views]
        largest = max(len(rows) for rows in patches)
        side, size = math.isqrt(self.config.vision.num_positions), self.slicing.patch_size
        arrays = (
            np.zeros((len(views), largest, patches[0].shape[1]), np.float32),
            np.zeros((len(views), largest), np.int32),
            np.zeros((len(views), largest, 2), np.int32),
            np.zeros(len(views), np.int32),
        )
        for row, (view, values) in enumerate(zip(views, patches, strict=True)):
            ids, places = view_positions(view.height // size, view.width // size, side)
            for array, content in zip(arrays[:3], (values, ids, places), strict=True):
                array[row, : len(values)] = content
            arrays[3][row] = len(values)
        return PreparedImage(arrays, ImageTokens(len(views) * self.config.resampler.num_queries, grid))

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        """See `Preparer.prompt`."""
        ids, is_visual, answer_length = self.chat.encode(sample, [image.grid for image in images], answer)
        return Prompt.plain(ids, is_visual, answer_length)


def benchmark_prompt(instance: Instance, config: MiniCPMVConfig, step_by_step: bool) -> Turn:
    """The prompts of VLMEvalKit's vlm/minicpm_v.py (MiniCPM_V_2_6), without `use_cot` unless `step_by_step`."""
    question = instance.question
    if step_by_step and instance.dataset in STEP_BY_STEP_DATASETS:
        if not instance.options:
            return Turn(STEP_BY_STEP + question)
        lines = (*hint(instance, "Hint: "), question, *options(instance))
        return Turn("".join((CHOICE_STEP_BY_STEP, *(f"{line}\n" for line in lines))))
    if instance.options:
        return Turn(f"{question_and_options(instance)}\n{ANSWER_LETTER}")
    if instance.dataset == "HallusionBench":
        return Turn(f"{question} Yes or No?")
    if instance.dataset in ("MME", "POPE"):
        return Turn(question)
    # Its "system prompt" is text before the image; line breaks join the parts of a turn.
    return Turn("\n".join((SHORT_ANSWER, *[IMAGE_MARK] * len(instance.images), question)), marked=True)
