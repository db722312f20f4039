"""Parity of MiniCPM-V 2.6 with a PyTorch model put together for the tests, through the real loader, slicing and prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

from rlens_jax import torch_twin
from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.leaves import place
from rlens_jax.data.samples import Sample
from rlens_jax.engine.inputs import build_split
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.shapes import Shapes, row_buckets
from rlens_jax.errors import UserError
from rlens_jax.families.minicpm_v import model as minicpm_v
from rlens_jax.families.minicpm_v import preparer as minicpm_v_preparer
from rlens_jax.families.minicpm_v.model import MiniCPMVConfig
from rlens_jax.families.minicpm_v.preparer import NO_SLICES, MiniCPMVPreparer, Slicing
from rlens_jax.families.registry import ModelKind, read_kind
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import ImageTokens, PreparedImage, Prompt, collate_alone
from rlens_jax.ops.attention import masked_attention
from rlens_jax.plans import Plan, Reduction
from rlens_jax.sharding.mesh import make_mesh
from tests.families import minicpm_v as reference
from tests.families.contract import BOTH, SIMPLE, WHOLE, ForwardContract, Logits, set_to, swap
from tests.families.measured import check_measured
from tests.families.minicpm_v import NUM_QUERIES, config_json, cut_views, save_processing
from tests.families.padding import padded
from tests.numerics import assert_close, error
from tests.sequences import bucket_for, unpack
from tests.torch_reductions import reduced

pytestmark = [pytest.mark.torch, pytest.mark.slow]

KEY = jax.random.key(0)
SMALL = Reduction(attention_range=7, active_fraction=0.3)
PLAIN = Plan()


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Waves, an edge and noise in three channels; size is (width, height)."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(*(np.linspace(0, 1, length) for length in size))
    channels = []
    for _ in range(3):
        wave = sum(np.sin(2 * np.pi * (a * x + b * y)) for a, b in rng.uniform(-7, 7, (3, 2)))
        channels.append(128 + 30 * wave + 40 * (x > rng.uniform(0.2, 0.8)) + 8 * rng.standard_normal(x.shape))
    return Image.fromarray(np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Pair:
    """The same weights on both sides."""

    theirs: reference.MiniCPMV
    kind: ModelKind
    preparer: MiniCPMVPreparer
    ours: VisionLanguageModel

    @property
    def config(self) -> MiniCPMVConfig:
        return self.kind.config


@dataclass(frozen=True)
class Example:
    """One sample as both sides read it."""

    prompt: Prompt
    images: list[PreparedImage]
    visual: list[torch.Tensor]
    """Visual tokens of each image, from PyTorch."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = save_processing(tmp_path_factory.mktemp("tiny"))
    theirs = reference.MiniCPMV(seed=0)
    theirs.save(folder)
    kind, ours = load_model(folder, jnp.float32)
    preparer = MiniCPMVPreparer(folder, kind.config)
    return Pair(theirs, kind, preparer, ours)


def test_images_are_sized_without_being_prepared(pair, tmp_path):
    folder = save_processing(tmp_path)
    (folder / "config.json").write_text(json.dumps(pair.kind.fields))
    check_measured(folder, pair.preparer)
    check_measured(folder, pair.kind.preparer(folder, {"max_slices": 3}), max_slices=3)


LARGE, TALL, WIDE, LITTLE = (250, 240), (61, 150), (203, 90), (70, 40)
"""Of 10, 4, 7 and 1 views."""
LITTLE_TOKENS = ImageTokens(NUM_QUERIES)
BATCHES = {
    "one image": [("What is it?", (WIDE,))],
    "two images with text between": [("See <image> or\n<image>? Say.", (WIDE, LITTLE))],
    "ragged": [("What?", (TALL,)), ("Which one?", (LITTLE, WIDE)), ("No image.", ()), ("A <image>", (LITTLE,))],
    "most slices": [("Read.", (LARGE,))],
}


def sample_of(question: str, num_images: int) -> Sample:
    return Sample("s", "d", (b"",) * num_images, question, ("yes",), marked="<image>" in question)


def prepare(pair: Pair, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
    """Images padded to 96 patches a view and 1, 4, 7 or 10 views."""
    return padded(pair.preparer.images(pictures, "s"), pair.kind, (96,))


def make_examples(pair: Pair, batch: str) -> list[Example]:
    examples = []
    for seed, (question, sizes) in enumerate(BATCHES[batch]):
        pictures = [picture(10 * seed + i, size) for i, size in enumerate(sizes)]
        prepared = prepare(pair, pictures)
        prompt = pair.preparer.prompt(sample_of(question, len(sizes)), [image.tokens for image in prepared], None)
        visual = [pair.theirs.visual_tokens(cut_views(image)[0]) for image in pictures]
        examples.append(Example(prompt, list(prepared), visual))
    return examples


def filled(image: PreparedImage, value: float = 1e3) -> tuple[np.ndarray, ...]:
    """An image's arrays with other values than zero in its padding."""
    patches, ids, places, counts = (array.copy() for array in image.arrays)
    padding = np.arange(patches.shape[1])[None] >= counts[:, None]
    patches[padding], ids[padding], places[padding] = value, 3, 7
    return patches, ids, places, counts


@partial(jax.jit, static_argnames="graph")
def run_vision(graph, state, *arrays):
    return nnx.merge(graph, state)(*arrays)


def our_visual(model: VisionLanguageModel, example: Example) -> list[np.ndarray]:
    """Visual tokens of each image."""
    vision = nnx.split(model.vision)
    return [
        np.asarray(run_vision(*vision, *(array[None] for array in filled(image)))[0, : image.tokens.count])
        for image in example.images
    ]


@partial(jax.jit, static_argnames=("graph", "plan", "reduction"))
def run_prefill(graph, state, batch, visual, plan: Plan, reduction: Reduction):
    decoder = nnx.merge(graph, state)
    context = decoder.context(batch.layout, batch.rope_positions, KEY)
    x, record = decoder.prefill(decoder.embed(batch.text_ids, visual), context, plan, reduction)
    return decoder.logits(x), record.kept.scored.all()


def our_logits(
    model: VisionLanguageModel, examples: Sequence[Example], plan: Plan = PLAIN, reduction: Reduction = SMALL
) -> list[np.ndarray]:
    """Logits of all tokens of each sample, from one padded batch."""
    prompts = [example.prompt for example in examples]
    bucket = bucket_for([prompt.is_visual for prompt in prompts], (2, 3))
    batch = jax.tree.map(jnp.asarray, collate_alone(prompts, bucket, 1))
    visual = np.full((len(prompts), bucket.visual, model.decoder.config.width), 5, np.float32)
    for row, example in enumerate(examples):
        tokens = np.concatenate([np.zeros((0, visual.shape[2]), np.float32), *our_visual(model, example)])
        visual[row, : len(tokens)] = tokens
    logits, scored = run_prefill(*nnx.split(model.decoder), batch, jnp.asarray(visual), plan, reduction)
    assert scored
    return unpack(logits, batch.layout)


def their_logits(pair: Pair, examples: Sequence[Example]) -> list[np.ndarray]:
    return [pair.theirs.logits(e.prompt.token_ids, e.visual).numpy() for e in examples]


@pytest.mark.parametrize("size", [LARGE, TALL, WIDE, LITTLE])
def test_tower_and_resampler(pair, size):
    image = picture(3, size)
    (prepared,) = prepare(pair, [image])
    views, _ = cut_views(image)
    patches, ids, places, counts = filled(prepared)
    features = np.asarray(jax.jit(pair.ours.vision.features)(patches, ids, counts))
    theirs = [pair.theirs.features(view) for view in views]
    fed = np.full_like(features, 9)
    for row, (x, rows, columns) in enumerate(theirs):
        assert counts[row] == rows * columns
        assert_close(features[row, : counts[row]], x, SIMPLE)
        fed[row, : counts[row]] = x
    tokens = np.asarray(jax.jit(pair.ours.vision.resampler)(jnp.asarray(fed), places, counts))
    with torch.no_grad():
        for row, (x, rows, columns) in enumerate(theirs):
            assert_close(tokens[row], pair.theirs.resampler(x, rows, columns), SIMPLE)
    whole = jax.jit(pair.ours.vision)(*(array[None] for array in (patches, ids, places, counts)))
    assert whole.shape == (1, len(counts) * NUM_QUERIES, pair.config.decoder.width)
    assert_close(whole[0, : prepared.tokens.count], pair.theirs.visual_tokens(views), SIMPLE)


def test_images_of_one_bucket_are_encoded_together(pair):
    images = prepare(pair, [picture(seed, WIDE) for seed in range(3)])
    together = jax.jit(pair.ours.vision)(*map(np.stack, zip(*(i.arrays for i in images), strict=True)))
    for seed, tokens in enumerate(together):
        expected = pair.theirs.visual_tokens(cut_views(picture(seed, WIDE))[0])
        assert_close(tokens[: images[seed].tokens.count], expected, SIMPLE)


@pytest.mark.parametrize("side", [70, 32, 10])
def test_position_buckets_are_those_of_torch(side):
    for patches in range(1, 401 if side == 70 else 71):
        expected = reference.position_buckets(patches, side).numpy()
        np.testing.assert_array_equal(minicpm_v_preparer.position_buckets(patches, side), expected, err_msg=str(patches))


def test_positions_go_row_by_row():
    ids, places = minicpm_v_preparer.view_positions(2, 3, 70)
    assert ids.tolist() == [0, 23, 46, 35 * 70, 35 * 70 + 23, 35 * 70 + 46]
    assert places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_positions_of_the_resampler_in_a_large_grid(pair):
    _, places = minicpm_v_preparer.view_positions(2, 90, 70)
    ours = minicpm_v.sincos_positions(places[None], 256)[0]
    assert_close(ours, pair.theirs.resampler.positions(2, 90), SIMPLE)


def published_slicing() -> Slicing:
    half = np.full(3, 0.5, np.float32)
    return Slicing(max_slices=9, resolution=448, patch_size=14, mean=half, std=half)


@pytest.mark.parametrize(
    ("size", "grid", "whole", "sliced"),
    [
        ((448, 448), NO_SLICES, (448, 448), None),
        ((100, 50), NO_SLICES, (630, 322), None),
        ((449, 448), (2, 1), (448, 448), (644, 630)),
        ((1920, 1080), (4, 2), (602, 336), (1680, 952)),
        ((1080, 1920), (2, 4), (336, 602), (952, 1680)),
        ((1344, 1344), (3, 3), (448, 448), (1344, 1344)),  # published: 1.8 million pixels, 640 tokens
    ],
)
def test_known_slices(size, grid, whole, sliced):
    slicing = published_slicing()
    assert slicing.grid(size) == grid
    views, seen = slicing.views(Image.new("RGB", size))
    assert seen == grid
    assert views[0].size == whole
    if grid != NO_SLICES:
        assert slicing.sliced_size(size, grid) == sliced
        assert {view.size for view in views[1:]} == {(sliced[0] // grid[0], sliced[1] // grid[1])}
        assert len(views) == 1 + grid[0] * grid[1]


def test_slices_of_many_sizes_are_those_of_the_next_version(pair):
    """MiniCPM-V 4.6 in transformers slices alike, in units of four patches."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    theirs, slicing = MiniCPMV4_6ImageProcessorPil(), published_slicing()
    sizes = np.random.default_rng(0).integers(20, 2500, (1500, 2)).tolist()
    for width, height in sizes:
        grid = slicing.grid((width, height))
        other = theirs.get_sliced_grid((height, width), 9, 448)
        assert (None if grid == NO_SLICES else [grid[1], grid[0]]) == other
        small = theirs.find_best_resize((height, width), 448, 14 / 4, "16x", grid == NO_SLICES)
        assert slicing.view_size((width, height), enlarge=grid == NO_SLICES) == small[::-1]
        if grid != NO_SLICES:
            large = theirs.get_refine_size((height, width), other, 448, 14 / 4, "16x", True)
            assert slicing.sliced_size((width, height), grid) == large[::-1]


@pytest.mark.parametrize("size", [LARGE, TALL, WIDE, LITTLE, (30, 600)])
def test_patches_hold_the_pixels_of_their_view(pair, size):
    image = picture(5, size)
    views, grid = pair.preparer.slicing.views(image)
    expected, expected_grid = cut_views(image)
    assert grid == (expected_grid or NO_SLICES)
    for view, pixels in zip(views, expected, strict=True):
        rows, columns = (length // reference.PATCH for length in pixels.shape[1:])
        blocks = torch.nn.functional.unfold(pixels[None], reference.PATCH, stride=reference.PATCH)
        assert blocks.shape[2] == rows * columns
        np.testing.assert_allclose(pair.preparer.slicing.patches(view), blocks[0].T, atol=1e-6)


def test_an_image_is_text_around_its_views(pair):
    """The whole prompt, spelled out: image ids, slices row by row with a line for each row, images before the text."""
    sizes = [(100, 100), LITTLE]
    images = [image.tokens for image in pair.preparer.images([picture(0, size) for size in sizes], "s")]
    assert [image.grid for image in images] == [(2, 2), NO_SLICES]
    slots = "<unk>" * NUM_QUERIES
    part = f"<slice>{slots}</slice>"
    user = (
        f"<image_id>0</image_id><image>{slots}</image>{part}{part}\n{part}{part}\n"
        f"<image_id>1</image_id><image>{slots}</image>\nWhich?"
    )
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    expected = turn.format("system", "You are a helpful assistant.") + turn.format("user", user)
    expected += "<|im_start|>assistant\n"
    prompt = pair.preparer.prompt(sample_of("Which?", 2), images, "An <unk>")
    written = pair.preparer.chat.tokenizer.decode(prompt.token_ids)
    assert written == expected + "An <unk><|im_end|>"
    assert prompt.answer_length == len("An <unk>") + 1
    assert prompt.num_visual == 6 * NUM_QUERIES
    assert (prompt.token_ids[prompt.is_visual] == reference.id_of("<unk>")).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], prompt.is_visual, [0]])))
    assert (np.diff(edges)[::2] == NUM_QUERIES).all() and len(edges) == 12
    assert prompt.rope_positions.tolist() == [list(range(len(prompt.token_ids)))]
    assert prompt.next_rope == len(prompt.token_ids)
    marked = pair.preparer.prompt(sample_of("A <image>b<image>", 2), [LITTLE_TOKENS] * 2, None)
    text = pair.preparer.chat.tokenizer.decode(marked.token_ids)
    image = f"<image>{slots}</image>"
    assert f"A <image_id>0</image_id>{image}b<image_id>1</image_id>{image}<|im_end|>" in text
    turns = (("A <image>", "So."),)
    spoken = replace(sample_of("b<image>", 2), marked=True, system="Be brief.", turns=turns)
    text = pair.preparer.chat.tokenizer.decode(pair.preparer.prompt(spoken, [LITTLE_TOKENS] * 2, None).token_ids)
    turns = ("system", "Be brief."), ("user", f"A <image_id>0</image_id>{image}"), ("assistant", "So.")
    said = "".join(turn.format(*each) for each in (*turns, ("user", f"b<image_id>1</image_id>{image}")))
    assert text == said + "<|im_start|>assistant\n"
    assert pair.preparer.chat.decode(prompt.token_ids[-9:].tolist()) == "An <unk>"
    assert pair.preparer.chat.stop_tokens == (reference.id_of("<|im_end|>"),)


def test_logits_of_a_model_with_tied_head(tmp_path):
    theirs = reference.MiniCPMV(seed=4, tie_word_embeddings=True)
    folder = theirs.save(save_processing(tmp_path), tie_word_embeddings=True)
    kind, ours = load_model(folder, jnp.float32)
    pair = Pair(theirs, kind, MiniCPMVPreparer(folder, kind.config), ours)
    examples = make_examples(pair, "two images with text between")
    assert_close(our_logits(ours, examples)[0], their_logits(pair, examples)[0], WHOLE)


def language_model(pair: Pair) -> SimpleNamespace:
    """Where `reduced` looks for the layers."""
    return SimpleNamespace(model=SimpleNamespace(language_model=pair.theirs.llm.model))


@pytest.mark.parametrize("plan", [PLAIN, BOTH], ids=Plan.label)
def test_greedy_tokens(pair, plan, tmp_path):
    """From image files to tokens, through what a run uses."""
    new_tokens, sizes = 40, (WIDE, LITTLE)
    files = []
    for i, size in enumerate(sizes):
        files.append(tmp_path / f"{i}.png")
        picture(20 + i, size).save(files[-1])
    sample = Sample("s", "d", tuple(files), "See <image> and <image>?", ("yes",), marked=True)
    other = Sample("t", "d", tuple(files[1:]), "And this?", ("yes",))
    mesh = make_mesh(jax.devices()[:1], 1)
    programs = Programs(place(pair.ours, mesh), mesh, SMALL, seed=0, new_tokens=new_tokens, stop_tokens=())
    shapes = Shapes(row_buckets((128, 256), (48,)), ((1, 96), (7, 96)), pair.kind.image_arrays, 2)
    split = build_split([sample, other], pair.preparer, programs, shapes, False)
    images = [ImageTokens(0, pair.preparer.slicing.grid(size)) for size in sizes]
    for row, (asked, used) in enumerate([(sample, slice(0, 2)), (other, slice(1, 2))]):
        (batch,) = [b for b in split.batches if row in np.asarray(b.inputs.samples)]
        numbers, tokens, scored = programs.generate(programs.put(batch.visual), batch.inputs, plan)
        assert scored.all()
        prompt = pair.preparer.prompt(asked, images[used], None)
        views = [cut_views(picture(20 + i, size))[0] for i, size in enumerate(sizes)][used]
        visual = [pair.theirs.visual_tokens(image) for image in views]
        mask = torch.tensor(prompt.is_visual)
        with reduced(language_model(pair), [mask], plan.attention, plan.ffn, 7, "0.3", "0.1"):
            expected = pair.theirs.generate(prompt.token_ids, visual, new_tokens)
        assert len(expected) == new_tokens
        assert len(set(expected)) > 5
        assert np.asarray(tokens)[np.asarray(numbers) == row].tolist() == [expected]


CHANGED_CODE = {}


def changed_code(function):
    """Changes what the model calls."""
    CHANGED_CODE[function.__name__] = function
    return function


@changed_code
def dropped_last_norm_of_the_tower(monkeypatch):
    monkeypatch.setattr(minicpm_v.VisionTower, "features", lambda self, *arrays: self.tower(*arrays))


@changed_code
def rows_and_columns_exchanged(monkeypatch):
    positions = minicpm_v.sincos_positions
    monkeypatch.setattr(minicpm_v, "sincos_positions", lambda places, width: positions(places[..., ::-1], width))


@changed_code
def no_mask_over_padding(monkeypatch):
    monkeypatch.setattr(minicpm_v, "masked_attention", lambda q, k, v, mask: masked_attention(q, k, v, jnp.ones_like(mask)))


@pytest.fixture
def compile_anew(pair, monkeypatch):
    """The vision tower is compiled in the test that asks for this, and forgotten after it."""
    run_vision.clear_cache()
    yield monkeypatch
    run_vision.clear_cache()


@pytest.mark.parametrize("name", CHANGED_CODE)
def test_a_wrong_model_misses_by_a_hundred_tolerances(pair, name, compile_anew):
    examples = make_examples(pair, "one image")
    CHANGED_CODE[name](compile_anew)
    (ours,), (theirs,) = our_logits(pair.ours, examples), their_logits(pair, examples)
    assert error(ours, theirs) > 100 * WHOLE


def test_views_in_another_order_miss_by_a_hundred_tolerances(pair):
    (example,) = make_examples(pair, "one image")
    (first,) = example.images
    order = [0, 1, 4, 2, 5, 3, 6]
    wrong = PreparedImage(tuple(array[order] for array in first.arrays), first.tokens)
    (theirs,) = their_logits(pair, [example])
    changed = Example(example.prompt, [wrong], example.visual)
    assert error(our_logits(pair.ours, [changed])[0], theirs) > 100 * WHOLE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 4.0}, "version = 4.0 is not supported (only 2.6 or '2.6')"),
        ({"version": None}, "version = None is not supported (only 2.6 or '2.6')"),
        ({"drop_vision_last_layer": True}, "drop_vision_last_layer = True is not supported (only False)"),
        ({"slice_mode": False}, "slice_mode = False is not supported (only True)"),
        ({"hidden_size": 208}, "hidden_size = 208 must be a multiple of 128, the head size of the resampler"),
        ({"vision_config": None}, "vision_config must be an object, not None"),
    ],
)
def test_refused_config(fields, message):
    with pytest.raises(UserError) as caught:
        read_kind(config_json(**fields), "config.json")
    assert str(caught.value) == f"config.json: {message}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 4.5}, "version = 4.5 is not supported (only 2.6)"),
        ({"slice_mode": False}, "slice_mode = False is not supported (only True)"),
        ({"image_feature_size": 64}, "image_feature_size = 64 is not supported (only 5)"),
        ({"patch_size": 14}, "patch_size = 14 is not supported (only 8)"),
        ({"max_slice_nums": 0}, "max_slice_nums must be a positive number, not 0"),
        ({"norm_mean": [0.5]}, "norm_mean must be three numbers, not [0.5]"),
        ({"norm_std": [0.5, 0.5, 0.0]}, "norm_std must be three positive numbers, not [0.5, 0.5, 0.0]"),
    ],
)
def test_refused_preprocessor_config(pair, fields, message, tmp_path):
    save_processing(tmp_path, **fields)
    with pytest.raises(UserError) as caught:
        MiniCPMVPreparer(tmp_path, pair.config)
    assert str(caught.value) == f"{tmp_path / 'preprocessor_config.json'}: {message}"


def test_missing_files(pair, tmp_path):
    with pytest.raises(UserError, match=r"no preprocessor_config.json; copy"):
        MiniCPMVPreparer(tmp_path, pair.config)
    save_processing(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no usable tokenizer \(.*\); copy the files") as caught:
        MiniCPMVPreparer(tmp_path, pair.config)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model(pair, tmp_path):
    save_processing(tmp_path, slice_start="<cut>")
    with pytest.raises(UserError, match=r"the tokenizer has no token '<cut>'"):
        MiniCPMVPreparer(tmp_path, pair.config)
    save_processing(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["chat_template"]
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"no chat template; copy"):
        MiniCPMVPreparer(tmp_path, pair.config)


@pytest.mark.parametrize("text", ["<video>", "</image><image>", "<slice>", "<image_id>0</image_id>", "<unk>", "<|im_end|>"])
def test_special_tokens_of_a_user_are_letters(pair, text):
    asked = replace(sample_of(f"What {text}?", 1), marked=False)
    prompt = pair.preparer.prompt(asked, [LITTLE_TOKENS], text)
    plain = pair.preparer.prompt(sample_of("What ?", 1), [LITTLE_TOKENS], "")
    assert len(prompt.token_ids) == len(plain.token_ids) + 2 * len(text)
    assert prompt.num_visual == NUM_QUERIES
    for token in reference.SPECIAL:
        number = reference.id_of(token)
        assert (prompt.token_ids == number).sum() == (plain.token_ids == number).sum()


def test_an_answer_that_merges_with_the_prompt(pair, monkeypatch):
    monkeypatch.setattr(pair.preparer.chat, "ids", lambda text, hidden: [len(text)])
    with pytest.raises(UserError, match=r"s: the answer 'yes' merges with the prompt's last token"):
        pair.preparer.prompt(sample_of("What?", 1), [LITTLE_TOKENS], "yes")


def transposed_projection(model: VisionLanguageModel) -> None:
    kernel = model.vision.resampler.proj.kernel
    kernel[...] = kernel[...].T


class TestMiniCPMV(ForwardContract):
    batches: ClassVar = BATCHES
    reduced: ClassVar = [("two images with text between", BOTH), ("most slices", BOTH)]
    reduction: ClassVar = SMALL
    mutations: ClassVar = {
        "dropped_decoder_bias": lambda model: set_to(model.decoder.layers.attention.q_proj.bias, 0),
        "dropped_patch_bias": lambda model: set_to(model.vision.tower.patch_embed.bias, 0),
        "dropped_query_bias": lambda model: set_to(model.vision.resampler.q_proj.bias, 0),
        "dropped_value_bias": lambda model: set_to(model.vision.resampler.v_proj.bias, 0),
        "dropped_output_bias": lambda model: set_to(model.vision.resampler.o_proj.bias, 0),
        "swapped_query_and_kv_norm": lambda model: swap(
            model.vision.resampler.query_norm.scale, model.vision.resampler.kv_norm.scale
        ),
        "swapped_kv_and_post_norm": lambda model: swap(
            model.vision.resampler.kv_norm.bias, model.vision.resampler.post_norm.bias
        ),
        "transposed_projection": transposed_projection,
    }
    mutated: ClassVar = "one image"

    def examples(self, pair: Pair, batch: str) -> list[Example]:
        return make_examples(pair, batch)

    def ours(self, model: VisionLanguageModel, pair: Pair, examples: list[Example], plan: Plan, reduction: Reduction) -> Logits:
        return our_logits(model, examples, plan, reduction)

    def theirs(self, pair: Pair, examples: list[Example]) -> Logits:
        return their_logits(pair, examples)

    def prompt(self, pair: Pair, example: Example) -> Prompt:
        return example.prompt

    def visual(self, pair: Pair, examples: list[Example]) -> list[np.ndarray]:
        none = np.zeros((0, pair.config.decoder.width), np.float32)
        return [np.concatenate([none, *our_visual(pair.ours, example)]) for example in examples]

    def asked(self, example: Example, token_ids: np.ndarray) -> Example:
        whole = np.concatenate([example.prompt.token_ids, token_ids])
        is_visual = np.concatenate([example.prompt.is_visual, np.zeros(len(token_ids), bool)])
        return replace(example, prompt=Prompt.plain(whole, is_visual))

    def masks(self, examples: list[Example]) -> list[np.ndarray]:
        return [example.prompt.is_visual for example in examples]

    def torch_model(self, pair: Pair) -> SimpleNamespace:
        return language_model(pair)

    def twin(self, pair: Pair, example: Example, plan: Plan) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        ids, model = example.prompt.token_ids, reference.AsTransformers(pair.theirs)
        marked = torch.tensor(np.where(example.prompt.is_visual, -1, ids))[None]
        with torch_twin.reduced(model, plan, self.reduction, image_token=-1) as record:
            logits = model(marked, ids, example.visual).numpy()
        return logits, {layer: units.numpy().astype(np.int32) for layer, units in record.kept_units.items()}
