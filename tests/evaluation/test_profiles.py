"""Profiles: the settings and prompts of VLMEvalKit for every family and benchmark, and how they meet given options."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, Instance
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.evaluation.evaluation import EvaluationConfig
from rlens_jax.evaluation.profiles import Entry, Manner, check_profile, find_entry
from rlens_jax.families.generation_config import Decoding
from rlens_jax.plan_file import PlanFile
from tests.families.published import BY_MODEL_TYPE, kind_of

PROFILE = "vlmevalkit@e8e78f05"


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("model_type", BY_MODEL_TYPE)
def test_the_profiles_prompts_are_those_that_are_asked(model_type: str) -> None:
    kind = kind_of(model_type)
    for name, benchmark in BENCHMARKS.items():
        options = {letter: f"{{{letter}}}" for letter in "AB"} if benchmark.task == "choice" else {}
        item = Instance(name, "0", "{question}", ("a",), options, {}, (b"image",))
        entry = find_entry(PROFILE, model_type, name)
        assert entry.prompt == kind.benchmark_prompt(item).text, name
        assert set(entry.limits) <= set(kind.family.limits)
        assert entry.model and entry.max_new_tokens in (2048, 4096, 16384)
    assert find_entry(PROFILE, model_type, "my own").prompt is None


def test_values_of_single_benchmarks() -> None:
    def limits(model_type: str, *names: str) -> list[dict[str, int]]:
        return [dict(find_entry(PROFILE, model_type, name).limits) for name in names]

    for model_type in ("qwen2_vl", "qwen2_5_vl"):
        small, usual = {"min_pixels": 78_400, "max_pixels": 12_845_056}, {"min_pixels": 1_003_520, "max_pixels": 12_845_056}
        assert limits(model_type, "OCRBench", "DocVQA_VAL", "MME") == [small, usual, usual]
    assert limits("qwen3_vl", "OCRBench", "MME") == [
        {"min_pixels": 102_400, "max_pixels": 16_777_216},
        {"min_pixels": 4096, "max_pixels": 16_777_216},
    ]
    tiles = {"OCRBench": 24, "InfoVQA_TEST": 24, "DocVQA_VAL": 18, "ChartQA_TEST": 12, "MMMU_DEV_VAL": 12, "HallusionBench": 6}
    assert limits("internvl", *tiles) == [{"max_tiles": count, "total_tiles": 64} for count in tiles.values()]
    doubled = [name for name in BENCHMARKS if find_entry(PROFILE, "internvl_chat", name).double_first]
    enlarged = {name for name in BENCHMARKS if find_entry(PROFILE, "minicpmv", name).enlarge}
    assert doubled == ["MMMU_DEV_VAL"]
    assert enlarged == {"OCRBench", "MMStar", *(name for name in BENCHMARKS if name.startswith(("MMBench", "AI2D")))}
    for name, entry in ((name, find_entry(PROFILE, "minicpmv", name)) for name in BENCHMARKS):
        assert any("3 beams" in note for note in entry.not_reproduced)
        assert any("enlarged" in note for note in entry.not_reproduced) == (name in enlarged)
    assert "temperature 0.7" in find_entry(PROFILE, "qwen3_vl", "MME").not_reproduced[0]
    assert "detailed, and polite" in str(find_entry(PROFILE, "llava", "MME").system)


def test_unknown_profiles_and_models() -> None:
    with pytest.raises(UserError, match=rf"--profile vlmevalkit: .* \(did you mean '{PROFILE}'\?\); there are {PROFILE}"):
        check_profile("vlmevalkit")
    with pytest.raises(UserError, match="nothing is known of models of the type toy; of qwen2_vl, "):
        find_entry(PROFILE, "toy", "MME")


def test_given_options_come_before_the_profile(tmp_path: Path) -> None:
    config = EvaluationConfig(
        "m", PlanFile(), ("MME",), tmp_path, profile=PROFILE, min_pixels=784, max_new_tokens=7, system="Be brief."
    )
    entry = config.entry("qwen2_vl", "MME")
    assert entry.limits == {"min_pixels": 784, "max_pixels": 12_845_056}
    assert (entry.max_new_tokens, entry.repetition_penalty, entry.system) == (7, 1.0, "Be brief.")
    plain = EvaluationConfig("m", PlanFile(), ("MME",), tmp_path, max_tiles=3)
    assert plain.entry("toy", "MME") == Entry(limits={"max_tiles": 3})


def test_images_of_a_question_as_a_profile_shows_them() -> None:
    """The first one doubled; or all enlarged, by the question's index."""
    images = png(20, 30), png(40, 10)
    sample = Sample("s", "d", images, "Q?", (), as_stored=True)

    def shown(entry: Entry, index: str = "3") -> Sample:
        return Manner(Decoding(4), entry).sample(sample, index)

    assert shown(Entry()) == sample
    doubled = shown(Entry(double_first=True, system="Be brief."))
    assert doubled.images[1] == images[1] != doubled.images[0] != images[0]
    assert doubled.system == "Be brief."
    first, again, other = (shown(Entry(enlarge=True), index).images for index in ("3", "3", "4"))
    assert first == again and first != other and first[0] != images[0]
