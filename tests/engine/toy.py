"""A tiny random Qwen2-VL with deepstack, and samples whose answers are what it says, so that reductions can change them."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from rlens_jax.checkpoints.leaves import place
from rlens_jax.config import FfnPath
from rlens_jax.data.samples import Sample
from rlens_jax.engine.evaluator import Outcomes
from rlens_jax.engine.inputs import Split, build_split
from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.shapes import Shapes, row_buckets
from rlens_jax.families import qwen2_vl
from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig, VisionConfig
from rlens_jax.families.qwen2_vl.preparer import patch_places, rope_positions
from rlens_jax.layout import Bucket
from rlens_jax.models.chat import Chat
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import FILLER, ImageTokens, PreparedImage, Prompt
from rlens_jax.plans import STANDARD_LEVELS, Levels, Plan, Reduction
from rlens_jax.search.objective import PlanScore, dataset_metric
from rlens_jax.sharding.mesh import make_mesh
from tests.toy_decoder import TOY

LAYERS, STOP, IMAGE = 5, 0, 1
DECODER = replace(
    TOY,
    num_layers=LAYERS,
    num_heads=4,
    head_dim=12,
    ffn_width=40,
    vocabulary=13,
    rope_theta=50.0,
    rope_sections=(2, 2, 2),
    deepstack=2,
)
CONFIG = Qwen2VLConfig(
    DECODER,
    VisionConfig(
        depth=1,
        width=16,
        num_heads=2,
        ffn_width=20,
        channels=3,
        temporal_patch=2,
        patch_size=1,
        merge_size=2,
        out_width=DECODER.visual_width,  # so the connector makes the features, too
    ),
    image_token=IMAGE,
    video_token=2,
)
REDUCTION = Reduction(attention_range=2, active_fraction=0.1, probe_fraction=0.2)


def shapes_of(text_slots: Sequence[int], visual_slots: Sequence[int], batch_size: int) -> Shapes:
    """Every pair of slots, and one size for all images."""
    return Shapes(row_buckets(text_slots, visual_slots), ((48,),), partial(qwen2_vl.FAMILY.image_arrays, CONFIG), batch_size)


SHAPES = replace(shapes_of((16,), (24,), 4), rows=(Bucket(8, 8), Bucket(16, 24)))
"""A small and a large bucket."""


class ToyChat(Chat):
    """Token ids as text."""

    stop_tokens = (STOP,)

    def __init__(self) -> None: ...

    def decode(self, ids: Sequence[int]) -> str:
        return words(list(ids))


class ToyPreparer:
    """Prompts from the sample's number alone: 1-3 images of different sizes, text around them."""

    chat = ToyChat()
    transparency = "white"

    def images(self, pixels: Sequence[Image.Image], sample_id: str) -> list[PreparedImage]:
        return [self.image(image) for image in pixels]

    def image(self, pixels: Image.Image) -> PreparedImage:
        grid = (pixels.height, pixels.width)
        rng = np.random.default_rng(pixels.height * 100 + pixels.width)
        patches = rng.standard_normal((grid[0] * grid[1], 6), np.float32)
        arrays = patches, patch_places(grid, 2), np.array(len(patches), np.int32)
        return PreparedImage(arrays, ImageTokens(len(patches) // 4, grid))

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        ids, grids = [], [image.grid for image in images]
        for number, (rows, columns) in enumerate(grids):
            ids += [3 + number, *[IMAGE] * (rows * columns // 4)]
        ids += [3 + (ord(letter) % 10) for letter in sample.question]
        answered = [] if answer is None else [*map(int, answer.split()), STOP]
        token_ids = np.array(ids + answered, np.int32)
        is_visual = token_ids == IMAGE
        is_visual[len(ids) :] = False  # the random model may well answer with the placeholder
        positions, following = rope_positions(is_visual, grids, 2)
        return Prompt(token_ids, is_visual, positions, following, len(answered))


@contextmanager
def damaged(programs: ModelPrograms, parameter: str, index: Any, value: float) -> Iterator[None]:
    """Some numbers of a parameter are `value` for a while."""
    number = programs.names.index(parameter)
    leaf = programs.leaves[number]
    programs.leaves[number] = leaf.at[index].set(value)
    try:
        yield
    finally:
        programs.leaves[number] = leaf


def png(rows: int, columns: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (columns, rows)).save(buffer, "PNG")
    return buffer.getvalue()


def toy_model() -> VisionLanguageModel:
    """The random model; embeddings and head are large enough for clear argmaxes."""
    model = qwen2_vl.FAMILY.model(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(3))
    model.decoder.embedding[...] = model.decoder.embedding[...] * 30
    model.decoder.head[...] = model.decoder.head[...] * 30
    return model


def toy_programs(
    new_tokens: int = 3,
    devices: int = 1,
    model_shards: int = 1,
    stop_tokens: tuple[int, ...] = (STOP,),
    levels: Levels = STANDARD_LEVELS,
    ffn_path: FfnPath = "auto",
) -> Programs:
    """Programs over the random model."""
    mesh = make_mesh(jax.devices()[:devices], model_shards)
    model = place(toy_model(), mesh, ffn_path)
    return Programs(model, mesh, REDUCTION, seed=0, new_tokens=new_tokens, stop_tokens=stop_tokens, levels=levels)


def toy_samples() -> list[Sample]:
    """Ragged samples of two datasets; the answers are still to be found."""
    rng = np.random.default_rng(3)
    samples = []
    for number in range(11):
        images = tuple(png(2 * int(rng.integers(1, 4)), 2 * int(rng.integers(1, 5))) for _ in range(int(rng.integers(1, 3))))
        question = "".join(chr(97 + int(letter)) for letter in rng.integers(0, 26, int(rng.integers(2, 7))))
        samples.append(Sample(f"s{number}", "even" if number % 2 == 0 else "odd", images, question, ("?",)))
    return samples


def answered(samples: list[Sample], programs: Programs, shapes: Shapes = SHAPES) -> list[Sample]:
    """The samples with what the dense model generates as their answer, without the stop token. In one bucket: one program."""
    largest = max(shapes.rows, key=lambda bucket: bucket.slots)
    split = build_split(samples, ToyPreparer(), programs, replace(shapes, rows=(largest,)), False)
    texts: dict[str, str] = {}
    for batch in split.batches:
        numbers, tokens, _ = map(np.asarray, programs.generate(programs.put(batch.visual), batch.inputs, Plan()))
        for number, row in zip(numbers.ravel(), tokens.reshape(-1, tokens.shape[-1]).tolist(), strict=True):
            if number != FILLER:
                texts[split.samples[number].id] = words(row)
    return [Sample(s.id, s.dataset, s.images, s.question, (texts[s.id],)) for s in samples]


def words(tokens: list[int]) -> str:
    """What a tokenizer would make of generated tokens: those before the first stop."""
    stop = tokens.index(STOP) if STOP in tokens else len(tokens)
    return " ".join(map(str, tokens[:stop]))


def toy_split(programs: Programs, with_answers: bool = True) -> Split:
    samples = answered(toy_samples(), programs)
    return build_split(samples, ToyPreparer(), programs, SHAPES, with_answers)


def score(outcomes: Outcomes) -> PlanScore:
    """The sum of the datasets' metrics: the dense toy model may well score 0."""
    metrics = {name: dataset_metric(values.tolist()) for name, values in outcomes.items()}
    return PlanScore(score=float(sum(metrics.values())), loss=0.0, metrics=metrics)
