"""The eight benchmarks: their columns, published MD5 sums and groups of questions, a row as an `Instance`, and its prompt.

The prompts here are those that several model families share; prompts of one family are in its folder (`benchmark_prompt`). The
chat template around them comes with the checkpoint. Sources of the prompts in open-compass/VLMEvalKit: dataset/image_base.py,
image_vqa.py and image_mcq.py (prompts of models without their own).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from types import MappingProxyType
from typing import Any, Literal

from rlens_jax.data.benchmarks.tsv import TsvRow, TsvTable, parse_list
from rlens_jax.errors import UserError, suggest

LETTERS = tuple(ascii_uppercase)
"""Columns of the options of a multiple-choice question (VLMEvalKit accepts every capital letter)."""
L2_CATEGORIES = ("l2-category", "l2_category")
"""Both spellings occur."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
ANSWER_LETTER = "Answer with the option's letter from the given choices directly."
SELECT = "Please select the correct answer from the options above."
CHINESE_LETTER = "请直接回答选项字母。"
"""Requests that end a prompt."""


@dataclass(frozen=True)
class Benchmark:
    """One TSV file of VLMEvalKit."""

    name: str
    md5: str
    """MD5 sum published by VLMEvalKit, in hex."""
    task: Literal["vqa", "yes_no", "choice"]
    answers: Literal["list", "single", "none"]
    """Content of `answer`: a list of references, one text (or a text that looks like a list), or nothing, if withheld."""
    columns: tuple[str, ...] = ()
    """Required columns in addition to index, question, answer and image."""

    @property
    def strata(self) -> tuple[str, ...]:
        """Columns that define the strata of a sample of the benchmark."""
        return tuple(name for name in self.columns if name in ("category", "l2-category", "split"))

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that the file must have in addition to index and image."""
        return ("question", *(() if self.answers == "none" else ("answer",)), *self.columns)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are kept if the file has them."""
        extra = ("category", *L2_CATEGORIES, "split", "image_path", "hint")
        options = LETTERS if self.task == "choice" else ()
        return tuple(name for name in dict.fromkeys((*extra, *options)) if name not in self.needed)


_BENCHMARKS = (
    Benchmark("OCRBench", "e953d98a987cc6e26ef717b61260b778", "vqa", "list", ("category",)),
    Benchmark("DocVQA_VAL", "d5ee77e1926ff10690d469c56b73eabf", "vqa", "list"),
    Benchmark("DocVQA_TEST", "6a2f28cac26ef2d3447374e8c6f6c8e9", "vqa", "none"),
    Benchmark("InfoVQA_VAL", "2342e9c225222f0ef4dec545ebb126fe", "vqa", "list"),
    Benchmark("InfoVQA_TEST", "df535bf51b88dc9718252c34131a6227", "vqa", "none"),
    Benchmark("ChartQA_TEST", "c902e0aa9be5582a7aad6dcf52734b42", "vqa", "single", ("split",)),
    Benchmark("TextVQA_VAL", "b233b31f551bbf4056f2f955da3a92cd", "vqa", "list"),
    Benchmark("MME", "b36b43c3f09801f5d368627fb92187c3", "yes_no", "single", ("category", "image_path")),
    Benchmark("MMStar", "e1ecd2140806c1b1bbf54b43372efb9e", "choice", "single", ("A", "B", "C", "D", "category")),
    Benchmark("HallusionBench", "0c23ac0dc9ef46832d7a24504f2a0c7c", "yes_no", "single", ("category", "l2-category")),
)
BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType({benchmark.name: benchmark for benchmark in _BENCHMARKS})
"""By VLMEvalKit's names, the names of the files without `.tsv`."""


def find_benchmark(name: str) -> Benchmark:
    """The benchmark with this name. UserError, with the nearest name, if there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}{suggest(name, BENCHMARKS)}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


@dataclass(frozen=True)
class Instance:
    """One question of a benchmark.

    Attributes:
        dataset, index, question: as in the file.
        answers: references in the file's order, with repetitions (TextVQA has ten); empty if withheld.
        options: text per letter of a multiple-choice question. As in VLMEvalKit, without options whose text pandas reads as
            a missing value, such as "None".
        fields: further columns, such as `category`.
        images: encoded files, as in the TSV file.
    """

    dataset: str
    index: str
    question: str
    answers: tuple[str, ...]
    options: Mapping[str, str]
    fields: Mapping[str, str]
    images: tuple[bytes, ...] = ()

    @property
    def id(self) -> str:
        """Unique id in a run, such as "MME/12"."""
        return f"{self.dataset}/{self.index}"

    @property
    def stratum(self) -> tuple[str, ...]:
        """The stratum of the instance when a sample is drawn."""
        return tuple(self.fields.get(name, "") for name in BENCHMARKS[self.dataset].strata)

    @property
    def group(self) -> tuple[str, ...]:
        """The group of questions that a metric scores together, so that a sample has all of them or none.

        MME: the two questions about an image (acc+). HallusionBench: the questions of a set, which contains whole figures
        (fAcc) and whole questions (qAcc). Other benchmarks: each question is a group.
        """
        if self.dataset == "MME":
            return (self.fields["category"], self.fields["image_path"])
        if self.dataset == "HallusionBench":
            return (self.fields["l2-category"], self.index.split("_")[3])
        return (self.index,)


def instance(benchmark: Benchmark, table: TsvTable, row: TsvRow) -> Instance:
    """A row of the benchmark's file as an instance without images. UserError if a value is missing or wrong."""
    for name in benchmark.needed:
        if row.value(name) is None and name not in ("answer", *LETTERS):
            raise UserError(f"{table.where(row, name)}: missing")
    options = _texts(row, LETTERS) if benchmark.task == "choice" else {}
    if benchmark.task == "choice" and not options:
        raise UserError(f"{table.where(row, 'A')}: no option has a text")
    if benchmark.name == "HallusionBench" and len(row.index.split("_")) < 6:
        raise UserError(
            f"{table.where(row, 'index')}: must have six parts joined by _, the last three of them the ids of "
            "set, figure and question"
        )
    others = [name for name in (*benchmark.columns, *benchmark.optional) if name not in LETTERS]
    return Instance(
        dataset=benchmark.name,
        index=row.index,
        question=row.cells["question"],
        answers=_answers(benchmark, table, row),
        options=options,
        fields=_texts(row, others),
    )


def _texts(row: TsvRow, columns: Sequence[str]) -> dict[str, str]:
    return {name: text for name in columns if (text := row.value(name)) is not None}


def _answers(benchmark: Benchmark, table: TsvTable, row: TsvRow) -> tuple[str, ...]:
    if benchmark.answers == "none":
        return ()
    where = table.where(row, "answer")
    text = row.cells["answer"]
    if not text:
        raise UserError(f"{where}: missing")
    if row.value("answer") is None:
        return ("nan",)  # "None" and the like: VLMEvalKit turns a missing value into this text and scores against it
    if not text.startswith("["):
        return (text,)
    try:
        answers = parse_list(text, where)
    except UserError:
        # ChartQA has answers such as "[Yes, No]", which are texts.
        if benchmark.answers == "list":
            raise
        return (text,)
    if not answers:
        raise UserError(f"{where}: an empty list of answers")
    return tuple(answers)


def named_sum(text: str, error: Callable[[str], Any]) -> tuple[str, str]:
    """The two parts of a command's option --md5 NAME=SUM; `error` reports a wrong option."""
    name, equals, md5 = text.partition("=")
    if not equals or len(md5) != 32:
        error(f"--md5 {text} must be NAME=SUM with 32 hexadecimal digits")
    return name, md5


@dataclass(frozen=True)
class Turn:
    """The user's turn for a question."""

    text: str
    marked: bool = False
    """Whether the first "<image>" marks are the places of the images; see `Sample.marked`. Others are the question's own text."""


def default_prompt(instance: Instance) -> Turn:
    """The prompt of a model that has none of its own in VLMEvalKit."""
    if is_choice(instance):
        return Turn(f"{question_and_options(instance)}{SELECT} \n")
    if BENCHMARKS[instance.dataset].task == "vqa" and instance.dataset != "OCRBench":
        return Turn(f"{instance.question}\n{SHORT_ANSWER}")
    return Turn(instance.question)


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
    """Hint, question and options, one per line."""
    lines = (*hint(instance, "Hint: "), f"Question: {instance.question}", "Options:", *options(instance))
    return "".join(f"{line}\n" for line in lines)


def choice_by_letter(instance: Instance) -> str:
    """The multiple-choice prompt of InternVL and of LLaVA-1.5 and LLaVA-NeXT in VLMEvalKit."""
    text = "\n".join((*hint(instance, ""), instance.question, *options(instance)))
    return f"{text}\n{CHINESE_LETTER if is_chinese(text) else ANSWER_LETTER}"


def is_chinese(text: str) -> bool:
    """Whether the text contains a Chinese character."""
    return re.search("[\u4e00-\u9fff]", text) is not None
