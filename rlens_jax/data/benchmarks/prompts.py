"""Parts of benchmark prompts that several model families share, as VLMEvalKit writes them.

Sources in open-compass/VLMEvalKit: dataset/image_base.py, image_vqa.py and image_mcq.py (prompts of models without their own).
Prompts of one family are in its folder (`benchmark_prompt`). The chat template around them comes with the checkpoint.
"""

import re

from rlens_jax.data.benchmarks.catalogue import BENCHMARKS, Instance

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
SELECT = "Please select the correct answer from the options above."
CHINESE_LETTER = "请直接回答选项字母。"


def default_prompt(instance: Instance) -> str:
    """The prompt of a model that has none of its own in VLMEvalKit."""
    if is_choice(instance):
        return f"{question_and_options(instance)}{SELECT} \n"
    if BENCHMARKS[instance.dataset].task == "vqa" and instance.dataset != "OCRBench":
        return f"{instance.question}\n{SHORT_ANSWER}"
    return instance.question


def is_choice(instance: Instance) -> bool:
    """Whether the answer is the letter of an option."""
    return BENCHMARKS[instance.dataset].task == "choice"


def hint(instance: Instance, label: str) -> list[str]:
    """The line of the hint; no line without a hint."""
    return [f"{label}{instance.fields['hint']}"] if "hint" in instance.fields else []


def options(instance: Instance) -> list[str]:
    """One line per option."""
    return [f"{letter}. {text}" for letter, text in instance.options.items()]


def question_and_options(instance: Instance) -> str:
    """Hint, question and options, each on a line."""
    lines = (*hint(instance, "Hint: "), f"Question: {instance.question}", "Options:", *options(instance))
    return "".join(f"{line}\n" for line in lines)


def is_chinese(text: str) -> bool:
    """Whether the text contains a Chinese character."""
    return re.search("[\u4e00-\u9fff]", text) is not None
