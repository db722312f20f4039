"""What each model family is asked, as VLMEvalKit asks it: the question with what it puts before, around and after it.

Read in open-compass/VLMEvalKit: dataset/image_base.py, image_vqa.py and image_mcq.py (the prompt of a family without its own),
vlm/internvl/internvl_chat.py and utils.py, vlm/qwen2_vl/prompt.py, vlm/minicpm_v.py (MiniCPM_V_2_6), vlm/llava/llava.py (no
prompts of its own). The chat template, and how images and text are joined, are the checkpoint's own.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, Instance
from rlens_jax.data.samples import IMAGE_MARK
from rlens_jax.errors import UserError, suggest

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
SELECT = "Please select the correct answer from the options above."
CHINESE_LETTER = "请直接回答选项字母。"
STEP_BY_STEP = (
    "Read the following question carefully, solve it step by step, and then output the final answer in the format of "
    '"Answer: single number or single word or phrase".\n\n'
)
MINICPM_STEP_BY_STEP = frozenset({"OCRBench", "ChartQA_TEST", "HallusionBench"})
"""MiniCPM-V 2.6 thinks before it answers on these."""


def prompt(family: str, instance: Instance, *, step_by_step: bool = True) -> str:
    """The text of the user's turn; "<image>" marks are in it only where images do not simply come first.

    Args:
        family: `model_type` of config.json.
        instance: with its images.
        step_by_step: whether MiniCPM-V gets VLMEvalKit's chain-of-thought prompts, where it has them. Without, it gets what
            VLMEvalKit has for the same benchmark with `use_cot` off: teacher forcing asks for the answer at once.

    Raises:
        UserError: the family has no prompts, or the question itself has an "<image>" mark.
    """
    if family not in FAMILIES:
        raise UserError(
            f"there are no benchmark prompts for model_type {family!r}{suggest(family, FAMILIES)}; there are for "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if IMAGE_MARK in instance.question:
        raise UserError(f"{instance.id}: the question contains {IMAGE_MARK}, which marks places of images")
    return FAMILIES[family](instance, step_by_step)


def _default(instance: Instance, step_by_step: bool) -> str:
    """Of a family without prompts of its own, LLaVA-OneVision among them."""
    del step_by_step
    if _is_choice(instance):
        return f"{_question_and_options(instance)}{SELECT} \n"
    if _is_vqa(instance) and instance.dataset != "OCRBench":
        return f"{instance.question}\n{SHORT_ANSWER}"
    return instance.question


def _internvl(instance: Instance, step_by_step: bool, mark_end: str) -> str:
    """`mark_end` ends the line of an image, where the chat template does not."""
    del step_by_step
    question = instance.question
    if _is_choice(instance):
        text = "\n".join((*_hint(instance, ""), question, *_options(instance)))
        text = f"{text}\n{CHINESE_LETTER if _is_chinese(text) else LETTER}"
    elif instance.dataset == "HallusionBench":
        text = f"{question} Please answer yes or no. {SHORT_ANSWER}"
    elif instance.dataset == "MME":
        text = f"{question} {SHORT_ANSWER}"
    else:
        text = f"{question}\n{SHORT_ANSWER}"
    if len(instance.images) < 2:
        return text
    names = (f"Image-{number}: {IMAGE_MARK}{mark_end}" for number in range(1, len(instance.images) + 1))
    return "".join((*names, text))


def _qwen2_vl(instance: Instance, step_by_step: bool) -> str:
    del step_by_step
    if _is_choice(instance):
        text = _question_and_options(instance)
        return text + (CHINESE_LETTER if _is_chinese(text) else SELECT)
    if instance.dataset == "HallusionBench":
        return f"{instance.question} Please answer yes or no."
    if instance.dataset == "MME":
        return instance.question
    return f"{instance.question}\nPlease try to answer the question with short words or phrases if possible."


def _minicpm_v(instance: Instance, step_by_step: bool) -> str:
    question = instance.question
    if step_by_step and instance.dataset in MINICPM_STEP_BY_STEP:
        return STEP_BY_STEP + question
    if _is_choice(instance):
        return f"{_question_and_options(instance)}\n{LETTER}"
    if instance.dataset == "HallusionBench":
        return f"{question} Yes or No?"
    if instance.dataset == "MME":
        return question
    # Its "system prompt" is text before the image; the parts of a turn are joined by line breaks.
    return "\n".join((SHORT_ANSWER, *[IMAGE_MARK] * len(instance.images), question))


FAMILIES: Mapping[str, Callable[[Instance, bool], str]] = MappingProxyType(
    {
        "internvl": lambda instance, step_by_step: _internvl(instance, step_by_step, ""),
        "internvl_chat": lambda instance, step_by_step: _internvl(instance, step_by_step, "\n"),
        "llava_onevision": _default,
        "minicpmv": _minicpm_v,
        "qwen2_vl": _qwen2_vl,
    }
)
"""By `model_type`, as config.json says it."""


def _is_choice(instance: Instance) -> bool:
    return BENCHMARKS[instance.dataset].task == "choice"


def _is_vqa(instance: Instance) -> bool:
    return BENCHMARKS[instance.dataset].task == "vqa"


def _hint(instance: Instance, label: str) -> list[str]:
    return [f"{label}{instance.fields['hint']}"] if "hint" in instance.fields else []


def _options(instance: Instance) -> list[str]:
    return [f"{letter}. {text}" for letter, text in instance.options.items()]


def _question_and_options(instance: Instance) -> str:
    lines = (*_hint(instance, "Hint: "), f"Question: {instance.question}", "Options:", *_options(instance))
    return "".join(f"{line}\n" for line in lines)


def _is_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None
