"""Bundles of each family but Qwen2-VL: they agree with PyTorch, dense and reduced, and what cannot be used is refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rlens_jax.checkpoints.checkpoint import load_model, read_model_kind
from rlens_jax.data.samples import Sample
from rlens_jax.families.minicpm_v.preparer import MiniCPMVPreparer
from rlens_jax.families.registry import read_kind
from rlens_jax.parity import comparison
from rlens_jax.parity.bundle import new_bundle
from rlens_jax.parity.dump import run_case
from rlens_jax.plans import Plan, Reduction
from tests import torch_reductions
from tests.families import internvl, qwen2_5_vl, qwen2_vl, qwen3_vl
from tests.families import llava as clip_llava
from tests.families import llava_onevision as llava
from tests.families import minicpm_v as minicpm
from tests.families.test_llava_preparer import write_texts
from tests.parity.command import refusal, validate
from tests.torch_support import save_tiny

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SMALL = Reduction(attention_range=5, active_fraction=0.3)
LAYERS = 3
PLANS = (Plan(), Plan(attention=(0, 2), ffn=(1, 2)))

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """A model folder, and what PyTorch computes with it in each of `PLANS`."""

    model: Path
    family: str
    cases: list[Tensors]

    def write(self, folder: Path, numbers: tuple[int, ...] = (0, 1)) -> Path:
        """A bundle of some cases."""
        framework = {"name": "pytorch", "version": torch.__version__}
        with new_bundle(folder, model="tiny", family=self.family, framework=framework, dtype="float32") as writer:
            for number in numbers:
                writer.add(PLANS[number], SMALL, self.cases[number])
        return folder


def make_llava(folder: Path) -> Reference:
    """Prompts with one image, two images, none, and one that is scaled down."""
    model = llava.tiny_llava(0, num_hidden_layers=LAYERS)
    parts = [[3, (20, 33), 5], [2, (33, 20), 1, (40, 15), 3], [13], [1, (61, 47), 6]]
    inputs = llava.hf_inputs([llava.make_example(seed, part) for seed, part in enumerate(parts, 1)])
    cases = [run_case(model, inputs, plan, SMALL, with_states=True) for plan in PLANS]
    return Reference(save_tiny(folder, model), "llava_onevision", cases)


def make_qwen(tiny: Callable[..., Any], folder: Path, layers: int = LAYERS) -> Reference:
    """Qwen2.5-VL or Qwen3-VL: prompts with one image, two images and none."""
    model = tiny(0, num_hidden_layers=layers)
    config = read_kind(model.config.to_dict(), "config.json").config
    parts = [[3, (6, 10), 5], [2, (10, 6), 1, (10, 2), 3], [13]]
    inputs = qwen2_vl.hf_inputs([qwen2_vl.make_example(seed, part, config) for seed, part in enumerate(parts, 1)])
    cases = [run_case(model, inputs, plan, SMALL, with_states=True) for plan in PLANS]
    return Reference(save_tiny(folder, model), model.config.model_type, cases)


def make_clip_llava(family: str, folder: Path) -> Reference:
    """LLaVA-1.5 or LLaVA-NeXT: prompts with one image, two images, and none."""
    model = clip_llava.MAKE[family](0, num_hidden_layers=LAYERS)
    folder = save_tiny(folder, model)
    config, parts = read_model_kind(folder).config, [[3, (20, 33), 5], [2, (33, 20), 1, (40, 15), 3], [13]]
    inputs = clip_llava.hf_inputs([clip_llava.make_example(config, seed, part) for seed, part in enumerate(parts, 1)])
    return Reference(folder, family, [run_case(model, inputs, plan, SMALL, with_states=True) for plan in PLANS])


INTERNVL_PARTS = [[3, (40, 90), 5], [2, (9, 8), 1, (50, 20), 3, (16, 16), 11], [13]]


def make_internvl(folder: Path) -> Reference:
    """InternVL3.5, in the layout of transformers."""
    model = internvl.tiny_internvl(0, text_model="qwen3", num_hidden_layers=LAYERS)
    examples = [internvl.make_example(seed, part) for seed, part in enumerate(INTERNVL_PARTS, 1)]
    inputs = internvl.hf_inputs(examples)
    cases = [run_case(model, inputs, plan, SMALL, with_states=True) for plan in PLANS]
    return Reference(save_tiny(folder, model), "internvl", cases)


def make_native_internvl(folder: Path) -> Reference:
    """The same computation, of InternLM2 in the native layout."""
    model = internvl.tiny_internvl(5, text_model="llama", num_hidden_layers=LAYERS)
    examples = [internvl.make_example(seed, part) for seed, part in enumerate(INTERNVL_PARTS, 1)]
    inputs = internvl.hf_inputs(examples)
    cases = [run_case(model, inputs, plan, SMALL, with_states=False) for plan in PLANS]
    for case in cases:
        case["img_context_token_id"] = np.array([internvl.IMAGE_TOKEN])
    return Reference(internvl.save_native(folder, model), "internvl_chat", cases)


MINICPM_SAMPLES = [("See <image> or\n<image>? Say.", ((203, 90), (70, 40))), ("No image.", ()), ("What?", ((61, 150),))]


def make_minicpm(folder: Path) -> Reference:
    """Prompts with two images, none and one; each prompt runs alone in PyTorch."""
    model = minicpm.MiniCPMV(seed=0, num_hidden_layers=LAYERS)
    model.save(minicpm.save_processing(folder), num_hidden_layers=LAYERS)
    kind, _ = load_model(folder, jnp.float32)
    preparer = MiniCPMVPreparer(folder, kind.config)
    prompts, visual, views, bounds = [], [], [], []
    for row, (question, sizes) in enumerate(MINICPM_SAMPLES):
        pictures = [llava.picture(10 * row + i, (height, width)) for i, (width, height) in enumerate(sizes)]
        images = [image.tokens for image in preparer.images(pictures, "s")]
        sample = Sample("s", "d", (b"",) * len(pictures), question, ("yes",), marked="<image>" in question)
        prompts.append(preparer.prompt(sample, images, None))
        cut = [minicpm.cut_views(image)[0] for image in pictures]
        visual.append([model.visual_tokens(image) for image in cut])
        views += [view for image in cut for view in image]
        starts = np.flatnonzero(np.isin(prompts[-1].token_ids, [minicpm.id_of("<image>"), minicpm.id_of("<slice>")]))
        bounds += [(row, start + 1, start + 1 + minicpm.NUM_QUERIES) for start in starts]
    length = max(len(prompt.token_ids) for prompt in prompts)

    def stacked(rows: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(row, [(0, length - len(row))] + [(0, 0)] * (row.ndim - 1)) for row in rows])

    strips = [published_strip(view) for view in views]
    most = max(strip.shape[2] for strip in strips)
    inputs = {
        "input_ids": stacked([prompt.token_ids for prompt in prompts]).astype(np.int64),
        "attention_mask": stacked([np.ones(len(prompt.token_ids), np.int64) for prompt in prompts]),
        "pixel_values": np.stack([np.pad(s, ((0, 0), (0, 0), (0, most - s.shape[2]))) for s in strips]),
        "tgt_sizes": np.array([[side // minicpm.PATCH for side in view.shape[1:]] for view in views]),
        "image_bound": np.array(bounds, np.int64),
    }
    language: Any = SimpleNamespace(model=SimpleNamespace(language_model=model.llm.model))
    cases = []
    for plan in PLANS:
        logits = []
        for prompt, images in zip(prompts, visual, strict=True):
            mask = torch.tensor(prompt.is_visual)
            with torch_reductions.reduced(language, [mask], plan.attention, plan.ffn, 5, "0.3", "0.1"):
                logits.append(model.logits(prompt.token_ids, images).numpy())
        cases.append({**inputs, "logits": stacked(logits)})
    return Reference(folder, "minicpmv", cases)


def published_strip(view: torch.Tensor) -> np.ndarray:
    """A view [3, h, w] as the published processor's `reshape_by_patch` gives it: [3, patch, patches * patch]."""
    side = minicpm.PATCH
    columns = torch.nn.functional.unfold(view[None], (side, side), stride=(side, side))
    blocks = columns.reshape(3, side, side, -1)
    return blocks.permute(0, 1, 3, 2).reshape(3, side, -1).numpy()


MAKE: dict[str, Callable[[Path], Reference]] = {
    "llava": partial(make_clip_llava, "llava"),
    "llava_next": partial(make_clip_llava, "llava_next"),
    "llava_onevision": make_llava,
    "internvl": make_internvl,
    "internvl_chat": make_native_internvl,
    "minicpmv": make_minicpm,
    "qwen2_5_vl": partial(make_qwen, qwen2_5_vl.tiny_qwen2_5_vl),
    "qwen3_vl": partial(make_qwen, qwen3_vl.tiny_qwen3_vl, layers=4),  # it has features for three
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def get(family: str) -> Reference:
        if family not in made:
            made[family] = MAKE[family](tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return get


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Read a folder's weights for its first bundle only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "load_model", cache(comparison.load_model))
        yield


@pytest.mark.parametrize("family", MAKE)
def test_agreement(family: str, references, tmp_path: Path) -> None:
    reference, report = references(family), tmp_path / "report.json"
    dense, small = (case["logits"] for case in reference.cases)
    assert np.abs(dense - small).max() > 1e-2, "the reduction changes nothing here"
    bundle = reference.write(tmp_path / "bundle")
    assert validate(reference.model, "--reference", bundle, "--json", report) == 0
    for case in json.loads(report.read_text())["cases"]:
        assert case["logits"]["num_positions"] == reference.cases[0]["attention_mask"].sum()
        assert 0 < case["logits"]["max_relative"] <= 1e-4


@pytest.mark.parametrize("family", MAKE)
def test_pixels_count(family: str, references, tmp_path: Path) -> None:
    """Two images, tiles or views in the other order are another sample."""
    reference = references(family)
    bundle = reference.write(tmp_path / "bundle", (0,))
    with edited(bundle) as case:
        pixels = case["pixel_values"]
        if family in ("llava", "llava_onevision"):  # the two images of one prompt
            pixels[[1, 2]] = pixels[[2, 1]]
        elif family == "llava_next":  # views of one image
            pixels[0, [0, 1]] = pixels[0, [1, 0]]
        else:
            pixels[[0, 1]] = pixels[[1, 0]]  # patches of one image for Qwen2.5-VL
    assert validate(reference.model, "--reference", bundle) == 1


def test_a_family_is_one_whatever_the_layout_of_its_folder(tmp_path: Path, capsys) -> None:
    """A bundle of either layout of InternVL is for models in both."""
    model = internvl.tiny_internvl(5, text_model="llama", num_hidden_layers=2)
    inputs = internvl.hf_inputs([internvl.make_example(1, [3, (40, 90), 5])])
    case = run_case(model, inputs, Plan(), SMALL, with_states=True)
    hf, native = save_tiny(tmp_path / "hf", model), internvl.save_native(tmp_path / "native", model)
    internvl.save_tokenizer(native)
    assert validate(native, "--reference", Reference(hf, "internvl", [case]).write(tmp_path / "a", (0,))) == 0
    case["img_context_token_id"] = np.array([internvl.IMAGE_TOKEN])
    assert validate(hf, "--reference", Reference(native, "internvl_chat", [case]).write(tmp_path / "b", (0,))) == 0
    other = Reference(hf, "qwen2_vl", [case]).write(tmp_path / "c", (0,))
    assert "the bundle is for 'qwen2_vl', the model is a 'internvl_chat'" in refusal(capsys, native, "--reference", other)
    unknown = Reference(hf, "internvl2", [case]).write(tmp_path / "d", (0,))
    assert "model_type 'internvl2' is not supported (did you mean 'internvl'?)" in refusal(capsys, hf, "--reference", unknown)


def test_every_image_is_alone_when_the_bundle_does_not_tell(references, tmp_path: Path) -> None:
    """As in transformers."""
    folder = tmp_path / "model"
    model = save_tiny(folder, theirs := llava.tiny_llava(0))
    inputs = llava.hf_inputs([llava.make_example(seed, [3, (20, 33), 5]) for seed in (1, 2)])
    del inputs["batch_num_images"]
    inputs = {name: torch.cat([t, t.flip(0)], 1) if t.ndim == 2 and "sizes" not in name else t for name, t in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"][[0, 1, 1, 0]]
    inputs["image_sizes"] = inputs["image_sizes"][[0, 1, 1, 0]]
    case = run_case(theirs, inputs, Plan(), SMALL, with_states=False)
    bundle = Reference(model, "llava_onevision", [case]).write(tmp_path / "bundle", (0,))
    assert validate(model, "--reference", bundle) == 0


@contextmanager
def edited(bundle: Path) -> Iterator[Tensors]:
    """The tensors of the first case, to be changed."""
    path = bundle / "case_00.safetensors"
    tensors = load_file(path)
    yield tensors
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)


def put(name: str, place: object, value: object) -> Callable[[Tensors], None]:
    return lambda t: t[name].__setitem__(place, value)


def less(name: str) -> Callable[[Tensors], None]:
    return lambda t: t.update({name: t[name][:-1]})


BAD = {
    "llava: a smaller size": (
        "llava_onevision",
        put("image_sizes", 0, (14, 14)),
        "image 0 has 7 views in pixel_values, 2 by its image_sizes [14, 14] (height, width)",
    ),
    "llava: a larger size": (
        "llava_onevision",
        put("image_sizes", 0, (61, 20)),
        "row 0 of input_ids has 37 image tokens, to which its images do not add up",
    ),
    "llava: a size of fewer tokens": (
        "llava_onevision",
        put("image_sizes", 0, (15, 33)),
        "row 0 of input_ids has 37 image tokens, to which its images do not add up",
    ),
    "llava: a size of nothing": (
        "llava_onevision",
        put("image_sizes", 0, (0, 33)),
        "image_sizes must be heights and widths in pixels, not 0",
    ),
    "llava: a missing size": ("llava_onevision", less("image_sizes"), "pixel_values has 4 images where image_sizes has 3"),
    "llava: several images for one": (
        "llava_onevision",
        lambda t: t.update(batch_num_images=np.array([4])),
        "image 0 has 7 views in pixel_values, 1 by its image_sizes [20, 33]",
    ),
    "llava: too few images": (
        "llava_onevision",
        less("batch_num_images"),
        "batch_num_images is [1, 2] where image_sizes has 4 images",
    ),
    "llava: views missing": (
        "llava_onevision",
        lambda t: t.update(pixel_values=t["pixel_values"][:, :3]),
        "image 0 has 3 views in pixel_values, 7 by its image_sizes [20, 33]",
    ),
    "llava: views of another size": (
        "llava_onevision",
        lambda t: t.update(pixel_values=t["pixel_values"][..., :-1]),
        "expected [I, views, 3, 14, 14]",
    ),
    "llava: a video": (
        "llava_onevision",
        put("input_ids", (2, 0), llava.VIDEO_TOKEN),
        "input_ids has video tokens; only images are supported",
    ),
    "llava_next: a smaller size": (
        "llava_next",
        put("image_sizes", 0, (14, 28)),
        "image 0 has 5 views in pixel_values, 3 by its image_sizes [14, 28]",
    ),
    "llava_1.5: a missing view": (
        "llava",
        less("pixel_values"),
        "row 1 of input_ids has 18 image tokens, to which its images do not add up",
    ),
    "llava_1.5: views of another size": (
        "llava",
        lambda t: t.update(pixel_values=t["pixel_values"][..., :-1]),
        "expected [I, 3, 14, 14]",
    ),
    "internvl: a missing tile": (
        "internvl",
        less("pixel_values"),
        "row 1 of input_ids has 96 image tokens, to which its images do not add up",
    ),
    "internvl: a tile too many": (
        "internvl",
        lambda t: t.update(pixel_values=t["pixel_values"][[0, *range(len(t["pixel_values"]))]]),
        "input_ids has tokens for",
    ),
    "internvl: part of a tile": (
        "internvl",
        put("input_ids", (2, 0), internvl.IMAGE_TOKEN),
        "row 2 of input_ids has 1 image tokens from token 0 on, which are no whole tiles of 16",
    ),
    "internvl: tiles of another size": (
        "internvl",
        lambda t: t.update(pixel_values=t["pixel_values"][..., :-2]),
        "expected [tiles, 3, 16, 16]",
    ),
    "internvl: another image token": (
        "internvl",
        lambda t: t.update(img_context_token_id=np.array([1])),
        "img_context_token_id is 1, but the model's config.json says",
    ),
    "native: no image token": ("internvl_chat", lambda t: t.pop("img_context_token_id"), "no tokenizer; copy tokenizer.json"),
    "native: a long prompt": (
        "internvl_chat",
        lambda t: t.update(input_ids=np.zeros((1, 600), np.int64), attention_mask=np.ones((1, 600), np.int64)),
        "with dynamic RoPE scaling at most 512 are supported",
    ),
    "minicpm: a bound outside the row": (
        "minicpmv",
        put("image_bound", (-1, slice(1, 3)), (900, 905)),
        "is [2, 900, 905]; row 2 has",
    ),
    "minicpm: a bound outside the batch": ("minicpmv", put("image_bound", (-1, 0), 3), "; input_ids has 3 rows"),
    "minicpm: a short bound": (
        "minicpmv",
        lambda t: t["image_bound"].__isub__([[0, 0, 1]] + [[0, 0, 0]] * (len(t["image_bound"]) - 1)),
        "; a view has 5 tokens",
    ),
    "minicpm: bounds out of order": (
        "minicpmv",
        lambda t: t.update(image_bound=t["image_bound"][::-1]),
        "bounds must go row by row, and forward in each without overlap",
    ),
    "minicpm: overlapping bounds": (
        "minicpmv",
        lambda t: t["image_bound"].__setitem__(1, t["image_bound"][0] + [0, 1, 1]),
        "bounds must go row by row, and forward in each without overlap",
    ),
    "minicpm: a missing bound": ("minicpmv", less("image_bound"), "image_bound has"),
    "minicpm: a missing size": ("minicpmv", less("tgt_sizes"), "views where tgt_sizes has"),
    "minicpm: a size beyond the pixels": (
        "minicpmv",
        put("tgt_sizes", 0, (99, 99)),
        "view 0 has tgt_sizes [99, 99], pixel_values room for",
    ),
    "minicpm: part of a patch": (
        "minicpmv",
        lambda t: t.update(pixel_values=t["pixel_values"][..., :-1]),
        "wide, which is no multiple of the patch, 8",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case: str, references, tmp_path: Path, capsys) -> None:
    family, spoil, expected = BAD[case]
    reference = references(family)
    bundle = reference.write(tmp_path / "bundle", (0,))
    with edited(bundle) as tensors:
        spoil(tensors)
    assert expected in refusal(capsys, reference.model, "--reference", bundle)


def with_llava_processor(folder: Path) -> Path:
    """A folder that PyTorch and the checkpoint's own processor can read, as can ours."""
    save_tiny(folder, llava.tiny_llava(1, num_hidden_layers=2))
    llava.image_processor().save_pretrained(folder)
    write_texts(folder)
    fields = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": llava.SIDE**2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": f"anyres_max_{llava.MOST_TILES}",
    }
    (folder / "processor_config.json").write_text(json.dumps(fields))
    return folder


def with_internvl_processor(folder: Path) -> Path:
    save_tiny(folder, internvl.tiny_internvl(1, text_model="qwen3", num_hidden_layers=2))
    internvl.save_tokenizer(folder, internvl.HF_TEMPLATE)
    path = folder / "tokenizer_config.json"
    named = {"start": "<img>", "end": "</img>", "context": "<IMG_CONTEXT>"}
    tokens = {f"{place}_image_token": token for place, token in named.items()} | {"video_token": "<video>"}
    fields = json.loads(path.read_text()) | {"pad_token": "<|im_end|>", "extra_special_tokens": tokens}
    path.write_text(json.dumps(fields))
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 16}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    size = {"height": internvl.TILE, "width": internvl.TILE}
    images = {"image_processor_type": "GotOcr2ImageProcessorFast", "size": size, "max_patches": 6}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


SAVE_WITH_PROCESSOR: dict[str, Callable[[Path], Path]] = {
    "llava_onevision": with_llava_processor,
    "internvl": with_internvl_processor,
    # LLaVA-1.5 has the same files.
    "llava_next": partial(clip_llava.save_llava, family="llava_next", template="mistral", num_hidden_layers=2),
    "qwen2_5_vl": qwen2_5_vl.save_random,  # names an image processor that transformers has no more
    "qwen3_vl": qwen3_vl.save_random,
}


@pytest.mark.parametrize("family", SAVE_WITH_PROCESSOR)
def test_dump_and_compare(family: str, tmp_path: Path, capsys) -> None:
    model, bundle = SAVE_WITH_PROCESSOR[family](tmp_path / "model"), tmp_path / "bundle"
    ffn = "0" if family == "internvl" else ""  # the decoder is that of all families
    options = ("--attention=0,1", f"--ffn={ffn}", "--attention-range=5", "--active-fraction=0.3")
    assert validate(model, "--dump", bundle, *options) == 0
    assert validate(model, "--reference", bundle) == 0
    cases = 4 if ffn else 2
    assert f"{cases} of {cases} cases within the tolerance of 0.0001" in capsys.readouterr().out
    dense, *others = (load_file(bundle / f"case_0{number}.safetensors")["logits"] for number in range(cases))
    assert all(np.abs(dense - other).max() > 1e-3 for other in others)


@pytest.mark.parametrize("family", ["minicpmv", "internvl_chat"])
def test_dump_of_a_model_that_transformers_lacks(family: str, references, tmp_path: Path, capsys) -> None:
    message = refusal(capsys, references(family).model, "--dump", tmp_path / "bundle")
    assert f"transformers has no class of model_type '{family}'; write a bundle with the published code" in message
    assert list(tmp_path.iterdir()) == []
