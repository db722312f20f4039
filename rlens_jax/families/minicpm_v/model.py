"""MiniCPM-V 2.6 (arXiv 2408.01800): adaptive slicing, SigLIP on views of any grid, a 64-query resampler, a Qwen2 decoder.

An image is one or several *views*: the whole image, and its slices where it is large. Each view has about 1024 patches and
becomes the same number of visual tokens. Views and patches are padded to buckets, with their real numbers as data. The code
that is published with the checkpoints is never run; slicing and prompts are restated here.

Axis letters: I images (or views), W views (padded), J patches (padded), C numbers of a patch, E tower width, D decoder
width, N heads, H head dim, Q queries (visual tokens of a view), M resampler outputs (= D), T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from PIL.Image import Image, Resampling
from transformers import PreTrainedTokenizerFast

from rlens_jax.data.samples import IMAGE_MARK, Sample
from rlens_jax.errors import UserError
from rlens_jax.families.hf_config import ConfigReader, read_json, read_qwen2_decoder
from rlens_jax.families.siglip import SiglipConfig, SiglipTower, read_siglip
from rlens_jax.models.chat import Chat, question_content
from rlens_jax.models.decoder import Decoder, DecoderConfig
from rlens_jax.models.layers import LayerNorm, Linear
from rlens_jax.models.prompt import PreparedImage, Prompt
from rlens_jax.ops.attention import masked_attention

VERSION = 2.6
"""MiniCPM-V 2.0 to 4.5 share one model_type; the version tells them apart."""
RESAMPLER_HEAD_DIM = 128
RESAMPLER_NORM_EPS = 1e-6
RESAMPLER_THETA = 10000.0
VIEW_STEP = 3
"""Views are padded to 1, 4, 7 or 10: few shapes to compile, and few views computed for nothing (our decision)."""
MOST_SLICES = 9
"""Of an image, besides the whole, where preprocessor_config.json has no `max_slice_nums` (9 in the published one)."""
VIDEO_MARK = "<video>"

Grid = tuple[int, int]
"""Columns and rows of slices."""


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of the connector: every view becomes `num_queries` visual tokens."""

    num_queries: int
    in_width: int
    width: int

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "Q": self.num_queries,
            "E": self.in_width,
            "D": self.width,
            "M": self.width,
            "N": self.width // RESAMPLER_HEAD_DIM,
            "H": RESAMPLER_HEAD_DIM,
        }


@dataclass(frozen=True)
class MiniCPMVConfig:
    """Everything that shapes a MiniCPM-V 2.6 model."""

    decoder: DecoderConfig
    vision: SiglipConfig
    resampler: ResamplerConfig


def read_config(config: ConfigReader) -> MiniCPMVConfig:
    """Sizes from config.json.

    Raises:
        UserError: a field is missing, or asks for a computation that is not supported.
    """
    version = config.fields.get("version")
    if version not in (VERSION, str(VERSION)):
        raise UserError(f"{config.where}: version = {version!r} is not supported (only {VERSION})")
    config.require("drop_vision_last_layer", False)
    config.require("slice_mode", True)
    decoder, vision = read_qwen2_decoder(config), read_siglip(config.section("vision_config"))
    if decoder.width % RESAMPLER_HEAD_DIM:
        raise UserError(
            f"{config.where}: hidden_size = {decoder.width} must be a multiple of {RESAMPLER_HEAD_DIM}, "
            "the head size of the resampler"
        )
    resampler = ResamplerConfig(config.size("query_num", default=64), vision.width, decoder.width)
    return MiniCPMVConfig(decoder, vision, resampler)


class Resampler(nnx.Module):
    """Learned queries attend to the patches of a view; keys carry 2-D sine and cosine positions, values do not."""

    def __init__(self, config: ResamplerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes, width = config.sizes, config.width
        shape = (config.num_queries, width)
        self.config = config
        self.query = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(0.02, dtype))
        self.kv_proj = Linear("IJE,ED->IJD", sizes, dtype=dtype, rngs=rngs)
        self.query_norm = LayerNorm(width, eps=RESAMPLER_NORM_EPS, dtype=dtype)
        self.kv_norm = LayerNorm(width, eps=RESAMPLER_NORM_EPS, dtype=dtype)
        self.q_proj = Linear("QD,DNH->QNH", sizes, bias="NH", dtype=dtype, rngs=rngs)
        self.k_proj = Linear("IJD,DNH->IJNH", sizes, bias="NH", dtype=dtype, rngs=rngs)
        self.v_proj = Linear("IJD,DNH->IJNH", sizes, bias="NH", dtype=dtype, rngs=rngs)
        self.o_proj = Linear("INQH,NHD->IQD", sizes, bias="D", dtype=dtype, rngs=rngs)
        self.post_norm = LayerNorm(width, eps=RESAMPLER_NORM_EPS, dtype=dtype)
        self.proj = Linear("IQD,DM->IQM", sizes, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "I J E"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I Q M"]:
        """Visual tokens of each view.

        Args:
            x: the tower's output, padded with anything finite.
            places: row and column of each patch in its view.
            num_patches: how many patches of each view are real.
        """
        images, patches, _ = x.shape
        values = self.kv_norm(self.kv_proj(x))
        keys = values + sincos_positions(places, self.config.width).astype(values.dtype)
        q = self.q_proj(self.query_norm(self.query[...])).swapaxes(0, 1)
        k, v = self.k_proj(keys).swapaxes(1, 2), self.v_proj(values).swapaxes(1, 2)
        is_patch = jnp.arange(patches)[None] < num_patches[:, None]
        mask = jnp.broadcast_to(is_patch[:, None], (images, q.shape[1], patches))
        attended = masked_attention(jnp.broadcast_to(q[None], (images, *q.shape)), k, v, mask)
        return self.proj(self.post_norm(self.o_proj(attended)))


def sincos_positions(places: Int[Array | np.ndarray, "I J 2"], width: int) -> Float[Array, "I J D"]:
    """Position embeddings of patches by row and column, float32: sines then cosines of the column, then of the row."""
    quarter = width // 4
    frequency = 1.0 / RESAMPLER_THETA ** (jnp.arange(quarter, dtype=jnp.float32) / quarter)
    angles = jnp.asarray(places, jnp.float32)[..., None] * frequency[None, None, None]
    row, column = angles[:, :, 0], angles[:, :, 1]
    return jnp.concatenate([jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)], axis=-1)


class VisionTower(nnx.Module):
    """Views to visual tokens: SigLIP, its last norm, and the resampler (the connector)."""

    def __init__(self, config: MiniCPMVConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.tower = SiglipTower(config.vision, dtype=dtype, rngs=rngs)
        self.post_norm = LayerNorm(config.vision.width, eps=config.vision.norm_eps, dtype=dtype)
        self.resampler = Resampler(config.resampler, dtype=dtype, rngs=rngs)

    def features(
        self,
        patches: Float[Array | np.ndarray, "I J C"],
        position_ids: Int[Array | np.ndarray, "I J"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I J E"]:
        """What the resampler reads of one view of each image; the arguments are those of `SiglipTower`."""
        return self.post_norm(self.tower(patches, position_ids, num_patches))

    def __call__(
        self,
        patches: Float[Array | np.ndarray, "I W J C"],
        position_ids: Int[Array | np.ndarray, "I W J"],
        places: Int[Array | np.ndarray, "I W J 2"],
        num_patches: Int[Array | np.ndarray, "I W"],
    ) -> Float[Array, "I WQ D"]:
        """Visual tokens of each image, view after view; those of padding views are meaningless numbers."""

        def encode(view: tuple[Array, ...]) -> Array:
            patches, position_ids, places, num_patches = view
            return self.resampler(self.features(patches, position_ids, num_patches), places, num_patches)

        # One view of all images at a time: ten views at once would need ten times the memory for scores.
        arrays = (jnp.asarray(array) for array in (patches, position_ids, places, num_patches))
        tokens = jax.lax.map(encode, tuple(array.swapaxes(0, 1) for array in arrays)).swapaxes(0, 1)
        return tokens.reshape(len(tokens), -1, tokens.shape[-1])


class MiniCPMV(nnx.Module):
    """The whole model: `vision` makes visual tokens, `decoder` reads them with the text."""

    def __init__(self, config: MiniCPMVConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.vision = VisionTower(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.decoder, dtype=dtype, rngs=rngs)


def _float32_range(start: float, stop: float, step: float) -> np.ndarray:
    """What torch.arange gives in float32 on a CPU: blocks of 8 whose first number is rounded before the steps are added.

    The last, incomplete block is not rounded in between. This decides on which side of a bucket's edge a number falls.
    """
    index = np.arange(math.ceil((stop - start) / step))
    lane = np.where(index < len(index) // 8 * 8, index % 8, 0)
    first = (start + step * (index - lane)).astype(np.float32).astype(np.float64)
    return (first + step * lane).astype(np.float32)


def position_buckets(patches: int, side: int) -> np.ndarray:
    """Which of the `side` positions of a trained axis each of `patches` patches in a row takes, int [patches].

    Bit-equal to the published rule (torch.bucketize of float32 fractions, whose step is itself rounded to float32).
    """
    edges = _float32_range(1 / side, 1.0, 1 / side)
    step = float(np.float32(1) / np.float32(patches))
    return np.searchsorted(edges, _float32_range(0.0, 1 - 1e-6, step), side="right")


def view_positions(rows: int, columns: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a view's patches, row by row: ids in a position table of `side` x `side`, int32 [J], and places, int32 [J, 2]."""
    ids = position_buckets(rows, side)[:, None] * side + position_buckets(columns, side)
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    return ids.reshape(-1).astype(np.int32), places.reshape(-1, 2).astype(np.int32)


@dataclass(frozen=True)
class Slicing:
    """How images become views, by preprocessor_config.json. Sizes are (width, height) in pixels."""

    max_slices: int
    resolution: int
    """Side of the square whose area a view has, about."""
    patch_size: int
    mean: np.ndarray
    std: np.ndarray
    """Of each channel, float32 [3]."""

    def grid(self, size: tuple[int, int]) -> Grid | None:
        """Columns and rows of the slices of an image; None where the whole image says it all."""
        width, height = size
        wanted = min(math.ceil(width * height / self.resolution**2), self.max_slices)
        if wanted <= 1:
            return None
        shape = math.log(width / height)
        grids = [
            (columns, slices // columns)
            for slices in (wanted - 1, wanted, wanted + 1)
            if 1 < slices <= self.max_slices
            for columns in range(1, slices + 1)
            if slices % columns == 0
        ]
        return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))

    def view_size(self, size: tuple[float, float], enlarge: bool) -> tuple[int, int]:
        """The size of whole patches at which one view is seen; a small one keeps its area unless it is to `enlarge`."""
        width, height = size
        if enlarge or width * height > self.resolution**2:
            shape = width / height
            height = int(self.resolution / math.sqrt(shape))
            width = int(height * shape)
        return _nearest_multiple(width, self.patch_size), _nearest_multiple(height, self.patch_size)

    def sliced_size(self, size: tuple[int, int], grid: Grid) -> tuple[int, int]:
        """The size of the whole image when each cell of the grid is one view."""
        cell = [_nearest_multiple(length, count) / count for length, count in zip(size, grid, strict=True)]
        width, height = self.view_size((cell[0], cell[1]), enlarge=True)
        return width * grid[0], height * grid[1]

    def views(self, image: Image) -> tuple[list[Image], Grid | None]:
        """The whole image, then its slices row by row; and the grid of the slices."""
        grid = self.grid(image.size)
        views = [image.resize(self.view_size(image.size, enlarge=grid is None), Resampling.BICUBIC)]
        if grid is not None:
            large = image.resize(self.sliced_size(image.size, grid), Resampling.BICUBIC)
            width, height = large.width // grid[0], large.height // grid[1]
            views += [
                large.crop((left, top, left + width, top + height))
                for top in range(0, large.height, height)
                for left in range(0, large.width, width)
            ]
        return views, grid

    def patches(self, view: Image) -> np.ndarray:
        """Normalised pixels of each patch, row by row: float32 [J, C], a patch as (channel, row, column)."""
        pixels = (np.asarray(view, np.float32) / np.float32(255) - self.mean) / self.std
        side = self.patch_size
        blocks = pixels.reshape(view.height // side, side, view.width // side, side, 3)
        return blocks.transpose(0, 2, 4, 1, 3).reshape(-1, 3 * side**2)


def _nearest_multiple(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)


def read_slicing(fields: ConfigReader, config: MiniCPMVConfig) -> Slicing:
    """Slicing from preprocessor_config.json; UserError where it does not go with the model."""
    fields.require("version", VERSION)
    fields.require("slice_mode", True)
    fields.require("image_feature_size", config.resampler.num_queries)
    fields.require("patch_size", config.vision.patch_size)
    mean, std = (fields.fields.get(name, [0.5, 0.5, 0.5]) for name in ("norm_mean", "norm_std"))
    for name, values, kind in (("norm_mean", mean, "numbers"), ("norm_std", std, "positive numbers")):
        three = isinstance(values, list) and len(values) == 3 and all(isinstance(x, int | float) for x in values)
        if not three or (values is std and min(std) <= 0):
            raise UserError(f"{fields.where}: {name} must be three {kind}, not {values!r}")
    return Slicing(
        max_slices=fields.size("max_slice_nums", default=MOST_SLICES),
        resolution=fields.size("scale_resolution", default=448),
        patch_size=config.vision.patch_size,
        mean=np.array(mean, np.float32),
        std=np.array(std, np.float32),
    )


@dataclass(frozen=True)
class Marks:
    """The texts of special tokens around and inside an image, by preprocessor_config.json."""

    image: tuple[str, str]
    slice: tuple[str, str]
    image_id: tuple[str, str]
    slot: str
    """Stands where a visual token goes; it also is an ordinary unknown token, so slots are found by what is around them."""
    use_image_id: bool

    def text(self, number: int, grid: Grid | None, num_queries: int) -> str:
        """What stands in the prompt for the image of this number: all its views, with a line for each row of slices."""
        slots = self.slot * num_queries
        text = slots.join(self.image)
        if self.use_image_id:
            text = str(number).join(self.image_id) + text
        if grid is not None:
            columns, rows = grid
            text += "\n".join([slots.join(self.slice) * columns] * rows)
        return text


def read_marks(fields: ConfigReader) -> Marks:
    """Marks from preprocessor_config.json, by default those of the published one."""

    def pair(start: str, end: str, default: str) -> tuple[str, str]:
        return (
            str(fields.fields.get(start, f"<{default}>")),
            str(fields.fields.get(end, f"</{default}>")),
        )

    return Marks(
        image=pair("im_start", "im_end", "image"),
        slice=pair("slice_start", "slice_end", "slice"),
        image_id=pair("im_id_start", "im_id_end", "image_id"),
        slot=str(fields.fields.get("unk", "<unk>")),
        use_image_id=bool(fields.fields.get("use_image_id", True)),
    )


class SlicedChat(Chat):
    """Tokenizer and chat template of a model folder, for prompts with text inside images."""

    def __init__(self, folder: Path, marks: Marks, num_queries: int):
        self.marks = marks
        self.num_queries = num_queries
        try:
            # Named, not looked up: tokenizer_config.json asks for a class that comes as code with the checkpoint.
            super().__init__(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{folder}: no usable tokenizer ({reason}); copy tokenizer.json and tokenizer_config.json beside config.json"
            ) from None
        if not self.tokenizer.chat_template:
            raise UserError(f"{folder}: tokenizer_config.json has no chat_template; copy the published one")
        for token in (*marks.image, *marks.slice, marks.slot):
            if self.ids(token) != [self.tokenizer.convert_tokens_to_ids(token)]:
                raise UserError(f"{folder}: the tokenizer has no token {token!r}; copy the files of MiniCPM-V 2.6")
        starts, ends = zip(marks.image, marks.slice, strict=True)
        self.starts, self.ends = (self.tokenizer.convert_tokens_to_ids(list(tokens)) for tokens in (starts, ends))

    def encode(
        self, sample: Sample, grids: Sequence[Grid | None], answer: str | None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Token ids int32 [T] of the prompt, which are visual, and the length of the answer with the end of the turn.

        Raises:
            UserError: the text contains marks of images or videos, or the answer cannot be told from the prompt.
        """
        if VIDEO_MARK in sample.question:
            raise UserError(f"{sample.id}: the question asks for a video ({VIDEO_MARK}); give its frames as images")
        images = [self.marks.text(i, grid, self.num_queries) for i, grid in enumerate(grids)]
        ids, num_answer = self.turn(sample, _content(sample, images), answer)
        token_ids = np.array(ids, np.int32)
        starts = np.flatnonzero(np.isin(token_ids, self.starts)) + 1
        ends = np.flatnonzero(np.isin(token_ids, self.ends))
        num_views = sum(1 if grid is None else 1 + math.prod(grid) for grid in grids)
        if not len(starts) == len(ends) == num_views or (ends - starts != self.num_queries).any():
            marks = ", ".join((*self.marks.image, *self.marks.slice))
            raise UserError(f"{sample.id}: the text contains marks of the model's images ({marks}); remove them")
        is_visual = np.zeros(len(token_ids), bool)
        for start, end in zip(starts, ends, strict=True):
            is_visual[start:end] = True
        return token_ids, is_visual, num_answer


def _content(sample: Sample, images: Sequence[str]) -> str:
    """A user turn: images at their marks, or each on a line of its own before the text, as the published `chat` does."""
    parts = question_content(sample.question, len(images))
    texts = iter(images)
    content = [next(texts) if part["type"] == "image" else part["text"] for part in parts]
    return ("" if IMAGE_MARK in sample.question else "\n").join(content)


def image_arrays(config: MiniCPMVConfig, patches: int) -> list[tuple[tuple[int, ...], DTypeLike]]:
    """Shapes and dtypes of an image as `Preparer` pads it to a bucket of so many patches."""
    views, channels = _view_slots(1 + MOST_SLICES), config.vision.sizes["C"]
    return [
        ((views, patches, channels), jnp.float32),
        ((views, patches), jnp.int32),
        ((views, patches, 2), jnp.int32),
        ((views,), jnp.int32),
    ]


def _view_slots(views: int) -> int:
    """Room for the whole image and its slices, in steps, so that programs are few."""
    return 1 + math.ceil((views - 1) / VIEW_STEP) * VIEW_STEP


class Preparer:
    """Images and prompts of a MiniCPM-V 2.6 checkpoint, by its preprocessor_config.json and tokenizer."""

    def __init__(self, folder: Path, config: MiniCPMVConfig, patch_slots: Sequence[int]):
        path = folder / "preprocessor_config.json"
        fields = ConfigReader(read_json(path), str(path))
        self.config = config
        self.patch_slots = sorted(patch_slots)
        self.slicing = read_slicing(fields, config)
        self.chat = SlicedChat(folder, read_marks(fields), config.resampler.num_queries)

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[tuple[PreparedImage, Grid | None]]:
        """All images of a sample, as `image` prepares each."""
        return [self.image(image, sample_id) for image in pixels]

    def image(self, pixels: Image, sample_id: str) -> tuple[PreparedImage, Grid | None]:
        """One image as views of padded patches, and the grid of its slices.

        The arrays are those that `VisionTower` reads, without the axis of images.
        """
        views, grid = self.slicing.views(pixels)
        patches = [self.slicing.patches(view) for view in views]
        most = max(len(rows) for rows in patches)
        slots = next((n for n in self.patch_slots if n >= most), None)
        if slots is None:
            raise UserError(
                f"{sample_id}: a view of an image has {most} patches, the largest bucket {self.patch_slots[-1]}; "
                "add a larger one to compute.patch_slots"
            )
        view_slots = _view_slots(len(views))
        side, size = math.isqrt(self.config.vision.num_positions), self.slicing.patch_size
        arrays = (
            np.zeros((view_slots, slots, patches[0].shape[1]), np.float32),
            np.zeros((view_slots, slots), np.int32),
            np.zeros((view_slots, slots, 2), np.int32),
            np.zeros(view_slots, np.int32),
        )
        for row, (view, values) in enumerate(zip(views, patches, strict=True)):
            ids, places = view_positions(view.height // size, view.width // size, side)
            for array, content in zip(arrays[:3], (values, ids, places), strict=True):
                array[row, : len(values)] = content
            arrays[3][row] = len(values)
        return PreparedImage(arrays, len(views) * self.config.resampler.num_queries), grid

    def prompt(self, sample: Sample, grids: Sequence[Grid | None], answer: str | None) -> Prompt:
        """The prompt of a sample whose images have slices in these grids, with a reference answer if one is given."""
        ids, is_visual, answer_length = self.chat.encode(sample, grids, answer)
        return Prompt(ids, is_visual, np.arange(len(ids), dtype=np.int32)[None], len(ids), answer_length)
