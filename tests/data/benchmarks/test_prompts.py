"""Exact prompts of every family and benchmark, as VLMEvalKit has them."""

from dataclasses import replace

import pytest

from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, Instance
from rlens_jax.data.benchmarks.mixture import to_sample
from rlens_jax.errors import UserError
from rlens_jax.models.chat import user_contents
from tests.families.published import BY_MODEL_TYPE, kind_of

SHORT = "Answer the question using a single word or phrase."
COT = (
    "Read the following question carefully, solve it step by step, and then output the final answer in the format of "
    '"Answer: single number or single word or phrase".\n\n'
)
BLOCK = "Question: Q?\nOptions:\nA. red\nB. blue\nC. green\nD. a b\n"
LETTERS = "Answer with the option's letter from the given choices directly."
SELECT = "Please select the correct answer from the options above."
VQA = ("DocVQA_VAL", "DocVQA_TEST", "InfoVQA_VAL", "InfoVQA_TEST", "TextVQA_VAL")
CHOICE = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.task == "choice")
CHOICE_COT = (
    "Carefully read the following multichoice question, solve it step by step and finally pick the option associated with the "
    'correct answer in the format of "Answer: selected option\n\n'
)
LINES = "Q?\nA. red\nB. blue\nC. green\nD. a b\n"
EXPECTED = {
    "llava_onevision": {
        **dict.fromkeys((*VQA, "ChartQA_TEST", "GQA_TestDev_Balanced"), f"Q?\n{SHORT}"),
        **dict.fromkeys(("OCRBench", "VizWiz", "MME", "HallusionBench", "POPE"), "Q?"),
        **dict.fromkeys(CHOICE, f"{BLOCK}{SELECT} \n"),
    },
    "internvl_chat": {
        **dict.fromkeys((*VQA, "ChartQA_TEST", "OCRBench", "GQA_TestDev_Balanced", "VizWiz"), f"Q?\n{SHORT}"),
        "MME": f"Q? {SHORT}",
        "HallusionBench": f"Q? Please answer yes or no. {SHORT}",
        "POPE": "Q?",
        **dict.fromkeys(CHOICE, f"{LINES}{LETTERS}"),
    },
    "qwen2_vl": {
        **dict.fromkeys(
            (*VQA, "ChartQA_TEST", "OCRBench", "GQA_TestDev_Balanced", "VizWiz"),
            "Q?\nPlease try to answer the question with short words or phrases if possible.",
        ),
        "MME": "Q?",
        **dict.fromkeys(("HallusionBench", "POPE"), "Q? Please answer yes or no."),
        **dict.fromkeys(CHOICE, f"{BLOCK}{SELECT}"),
    },
    "minicpmv": {
        **dict.fromkeys((*VQA, "GQA_TestDev_Balanced", "VizWiz"), f"{SHORT}\n<image>\nQ?"),
        **dict.fromkeys(("ChartQA_TEST", "OCRBench", "HallusionBench"), f"{COT}Q?"),
        **dict.fromkeys(("MME", "POPE"), "Q?"),
        **dict.fromkeys(CHOICE, f"{BLOCK}\n{LETTERS}"),
        "MMMU_DEV_VAL": CHOICE_COT + LINES,
    },
}
EXPECTED["internvl"] = EXPECTED["internvl_chat"]
# Those of a model that has none of its own; VLMEvalKit's entries of Qwen3-VL switch its own off.
EXPECTED["qwen2_5_vl"] = EXPECTED["qwen3_vl"] = EXPECTED["llava_onevision"]
for _name in ("llava", "llava_next"):
    EXPECTED[_name] = EXPECTED["llava_onevision"] | dict.fromkeys(CHOICE, f"{LINES}{LETTERS}")


def example(dataset: str, **changes: object) -> Instance:
    options = {"A": "red", "B": "blue", "C": "green", "D": "a b"} if dataset in CHOICE else {}
    instance = Instance(dataset, "3", "Q?", ("a",), options, {}, (b"image",))
    return replace(instance, **changes)  # type: ignore[arg-type]


def prompt(model_type: str, instance: Instance, *, step_by_step: bool = True) -> str:
    return kind_of(model_type).benchmark_prompt(instance, step_by_step=step_by_step).text


@pytest.mark.parametrize("family", BY_MODEL_TYPE)
def test_every_prompt(family: str) -> None:
    assert set(EXPECTED[family]) == set(BENCHMARKS)
    for dataset, expected in EXPECTED[family].items():
        assert prompt(family, example(dataset)) == expected, dataset


def test_without_steps_minicpm_answers_at_once() -> None:
    expected = EXPECTED["minicpmv"] | {
        "ChartQA_TEST": f"{SHORT}\n<image>\nQ?",
        "OCRBench": f"{SHORT}\n<image>\nQ?",
        "HallusionBench": "Q? Yes or No?",
        "MMMU_DEV_VAL": EXPECTED["minicpmv"]["MMStar"],
    }
    for dataset in BENCHMARKS:
        assert prompt("minicpmv", example(dataset), step_by_step=False) == expected[dataset]
    for family in set(BY_MODEL_TYPE) - {"minicpmv"}:
        for dataset in BENCHMARKS:
            assert prompt(family, example(dataset), step_by_step=False) == EXPECTED[family][dataset]


def test_options_that_are_there_and_a_hint() -> None:
    three = example("MMStar", options={"A": "1", "C": "3", "E": "5"}, fields={"hint": "Look."})
    block = "Hint: Look.\nQuestion: Q?\nOptions:\nA. 1\nC. 3\nE. 5\n"
    assert prompt("llava_onevision", three) == f"{block}{SELECT} \n"
    assert prompt("qwen2_vl", three) == f"{block}{SELECT}"
    assert prompt("minicpmv", three) == f"{block}\n{LETTERS}"
    for family in ("internvl", "llava", "llava_next"):
        assert prompt(family, three) == f"Look.\nQ?\nA. 1\nC. 3\nE. 5\n{LETTERS}"


def test_a_chinese_character_asks_for_the_letter_in_chinese() -> None:
    chinese = example("MMStar", options={"A": "红"})
    assert prompt("qwen2_vl", chinese) == "Question: Q?\nOptions:\nA. 红\n请直接回答选项字母。"
    assert prompt("internvl", chinese) == "Q?\nA. 红\n请直接回答选项字母。"
    assert prompt("minicpmv", chinese).endswith(LETTERS)
    assert prompt("llava_onevision", chinese).endswith(f"{SELECT} \n")


def test_several_images() -> None:
    """InternVL numbers them, a line each: the published template ends no line after an image, that of transformers does."""
    two = example("TextVQA_VAL", images=(b"1", b"2"))
    assert prompt("internvl_chat", two) == f"Image-1: <image>\nImage-2: <image>\nQ?\n{SHORT}"
    assert prompt("internvl", two) == f"Image-1: <image>Image-2: <image>Q?\n{SHORT}"
    assert prompt("minicpmv", two) == f"{SHORT}\n<image>\n<image>\nQ?"
    assert prompt("qwen2_vl", two) == EXPECTED["qwen2_vl"]["TextVQA_VAL"]


def test_open_questions_of_mmmu() -> None:
    expected = {
        "llava_onevision": "Question: Q?\n",
        "qwen2_vl": "Question: Q?",
        "internvl": "Q?\nAnswer the question directly.",
        "llava_next": "Q?\nAnswer the question directly.",
        "minicpmv": f"{COT}Q?",
    }
    item = example("MMMU_DEV_VAL", options={})
    assert {family: prompt(family, item) for family in expected} == expected
    assert prompt("minicpmv", item, step_by_step=False) == f"{SHORT}\n<image>\nQ?"
    hinted = example("MMMU_DEV_VAL", fields={"hint": "Look."})
    assert prompt("minicpmv", hinted) == f"{CHOICE_COT}Hint: Look.\n{LINES}"


def test_images_of_mmmu_stand_in_its_text() -> None:
    """Of a model without prompts of its own. Images that are not mentioned are left out, some are there twice."""
    item = example(
        "MMMU_DEV_VAL",
        question="Is <image 3> like <image 1>?",
        options={"A": "<image 3>", "B": "<image 10>"},
        images=(b"1", b"2", b"3"),
    )
    for family in ("llava_onevision", "qwen2_5_vl", "qwen3_vl"):
        turn = kind_of(family).benchmark_prompt(item)
        sample = turn.sample(item, ())
        assert sample.images == (b"3", b"1", b"3")
        (content,) = user_contents(sample)
        texts = ["Question: Is ", " like ", "?\nOptions:\nA. ", f"\nB. <image 10>\n{SELECT} \n"]
        assert [part.get("text", "image") for part in content] == [
            texts[0],
            "image",
            texts[1],
            "image",
            texts[2],
            "image",
            texts[3],
        ]
    for family in ("qwen2_vl", "internvl", "llava", "minicpmv"):
        turn = kind_of(family).benchmark_prompt(item)
        assert turn.sample(item, ()).images == item.images
        assert "Is <image 3> like <image 1>?" in turn.text
    unmentioned = kind_of("qwen2_5_vl").benchmark_prompt(replace(item, question="Why?", options={"A": "1"}))
    assert (unmentioned.marked, unmentioned.sample(item, ()).images) == (False, item.images)


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        ("See <image 4>.", "MMMU_DEV_VAL/3: mentions <image 4>, but has 1 images"),
        ("See <image 0>.", "MMMU_DEV_VAL/3: mentions <image 0>, but has 1 images"),
        ("An <image> tag in <image 1>.", "MMMU_DEV_VAL/3: <image> in its text cannot be told from the places of its images"),
    ],
)
def test_mentions_of_no_image(question: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        prompt("qwen2_5_vl", example("MMMU_DEV_VAL", question=question))


@pytest.mark.parametrize("model_type", BY_MODEL_TYPE)
def test_a_mark_in_a_question_is_text(model_type: str) -> None:
    """Images stand where the family's prompt puts them, and before the text otherwise."""
    for images in ((b"1",), (b"1", b"2")):
        item = example("TextVQA_VAL", question="Is <image> a tag?", images=images)
        (content,) = user_contents(to_sample(item, kind_of(model_type).benchmark_prompt))
        assert [part["type"] for part in content].count("image") == len(images)
        assert "Is <image> a tag?" in content[-1]["text"]
