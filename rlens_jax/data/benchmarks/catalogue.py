"""The benchmarks: their columns, published MD5 sums and groups of questions, a row as an `Instance`, and its prompt.

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
from rlens_jax.data.samples import IMAGE_MARK, Sample
from rlens_jax.errors import UserError, suggest
from rlens_jax.metrics.choice_metrics import check_rotations, circular_group

LETTERS = tuple(ascii_uppercase)
"""Columns of the options of a multiple-choice question (VLMEvalKit accepts every capital letter)."""
L2_CATEGORIES = ("l2-category", "l2_category")
"""Both spellings occur."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
ANSWER_LETTER = "Answer with the option's letter from the given choices directly."
ANSWER_DIRECTLY = "Answer the question directly."
SELECT = "Please select the correct answer from the options above."
CHINESE_LETTER = "请直接回答选项字母。"
"""Requests that end a prompt."""

MMMU = "MMMU_DEV_VAL"
"""The only benchmark with questions of both kinds: a question without options is open."""
_MAY_BE_EMPTY = ("answer", "hint", *LETTERS)
"""Needed columns whose cells may be missing; `_answers` checks that of the answer."""
_IMAGE_NUMBER = re.compile(r"<image ([0-9])>")
"""The place of an image in a question of MMMU."""


@dataclass(frozen=True)
class Benchmark:
    """One TSV file of VLMEvalKit."""

    name: str
    md5: str
    """MD5 sum published by VLMEvalKit, in hex."""
    task: Literal["vqa", "yes_no", "choice"]
    answers: Literal["list", "single", "text", "none"]
    """Content of the answers: a list of references, one text or a text that looks like a list, one text whatever it looks
    like, or nothing, if withheld."""
    columns: tuple[str, ...] = ()
    """Required columns in addition to index, question, answers and image."""
    answer_column: str = "answer"
    circular: bool = False
    """Whether a question has a row for each rotation of its options."""

    @property
    def strata(self) -> tuple[str, ...]:
        """Columns that define the strata of a sample of the benchmark."""
        return tuple(name for name in self.columns if name in ("category", "l2-category", "split"))

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that the file must have in addition to index and image."""
        return ("question", *(() if self.answers == "none" else (self.answer_column,)), *self.columns)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are kept if the file has them."""
        extra = ("category", *L2_CATEGORIES, "split", "image_path", "hint", *(("g_index",) if self.circular else ()))
        options = LETTERS if self.task == "choice" else ()
        return tuple(name for name in dict.fromkeys((*extra, *options)) if name not in self.needed)


def _mmbench(name: str, md5: str) -> Benchmark:
    columns = ("A", "B", "C", "D", "hint", "category", "l2-category", "split")
    return Benchmark(name, md5, "choice", "text", columns, circular=True)


def _science_qa(name: str, md5: str) -> Benchmark:
    return Benchmark(name, md5, "choice", "text", ("A", "B", "C", "D", "E", "hint", "split"))


def _four_options(name: str, md5: str, *columns: str) -> Benchmark:
    return Benchmark(name, md5, "choice", "text", ("A", "B", "C", "D", *columns))


# New ones at the end: the draw of a mixture depends on the places of its benchmarks.
_BENCHMARKS = (
    Benchmark("OCRBench", "e953d98a987cc6e26ef717b61260b778", "vqa", "list", ("category",)),
    Benchmark("DocVQA_VAL", "d5ee77e1926ff10690d469c56b73eabf", "vqa", "list"),
    Benchmark("DocVQA_TEST", "6a2f28cac26ef2d3447374e8c6f6c8e9", "vqa", "none"),
    Benchmark("InfoVQA_VAL", "2342e9c225222f0ef4dec545ebb126fe", "vqa", "list"),
    Benchmark("InfoVQA_TEST", "df535bf51b88dc9718252c34131a6227", "vqa", "none"),
    Benchmark("ChartQA_TEST", "c902e0aa9be5582a7aad6dcf52734b42", "vqa", "single", ("split",)),
    Benchmark("TextVQA_VAL", "b233b31f551bbf4056f2f955da3a92cd", "vqa", "list"),
    Benchmark("MME", "b36b43c3f09801f5d368627fb92187c3", "yes_no", "text", ("category", "image_path")),
    _four_options("MMStar", "e1ecd2140806c1b1bbf54b43372efb9e", "category"),
    Benchmark("HallusionBench", "0c23ac0dc9ef46832d7a24504f2a0c7c", "yes_no", "text", ("category", "l2-category")),
    Benchmark("POPE", "c12f5acb142f2ef1f85a26ba2fbe41d5", "yes_no", "text", ("category",)),
    Benchmark("GQA_TestDev_Balanced", "99b62f22e224d9b2f32dcbe41359d1c9", "vqa", "single"),
    _mmbench("MMBench_DEV_EN", "b6caf1133a01c6bb705cf753bb527ed8"),
    _mmbench("MMBench_DEV_EN_V11", "30c05be8f2f347a50be25aa067248184"),
    _mmbench("MMBench_TEST_EN_V11", "8d1a704e791df6f5d9fb3ef782b65365"),
    _science_qa("ScienceQA_VAL", "96320d05e142e585e7204e72affd29f3"),
    _science_qa("ScienceQA_TEST", "e42e9e00f9c59a80d8a5db35bc32b71f"),
    Benchmark("VizWiz", "fa4ac4164467563ed2fac6eac6631bd0", "vqa", "list", answer_column="answers"),
    _four_options("SEEDBench_IMG", "68017231464752261a2526d6ca3a10c0", "category"),
    Benchmark(
        MMMU,
        "585e8ad75e73f75dcad265dfd0417d64",
        "choice",
        "text",
        (*"ABCDEFGHI", "split", "category", "l2-category", "image_path"),
    ),
    _four_options("AI2D_TEST", "0f593e0d1c7df9a3d69bf1f947e71975"),
    _four_options("AI2D_TEST_NO_MASK", "fd8f463634d4fe9fbd23b876e8eea5be"),
    _four_options("RealWorldQA", "4de008f55dc4fd008ca9e15321dc44b7"),
)
BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType({benchmark.name: benchmark for benchmark in _BENCHMARKS})
"""By VLMEvalKit's names, the names of the files without `.tsv`."""
PAPER_BENCHMARKS = tuple(name for name in list(BENCHMARKS)[:10] if BENCHMARKS[name].answers != "none")
"""Those of the paper that have public answers."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "MMVet": "only a judge model (gpt-4-turbo) scores its answers",
        "VQAv2": "only the benchmark's server has the answers of its test set",
    }
)
"""Frequent benchmarks that are left out, and why, by the beginnings of their names."""


def find_benchmark(name: str) -> Benchmark:
    """The benchmark with this name. UserError, with the reason or the nearest name, if there is none."""
    for beginning, reason in REFUSED.items():
        if name.lower().replace("-", "").startswith(beginning.lower()):
            raise UserError(f"{name} cannot be scored here: {reason}")
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}{suggest(name, BENCHMARKS)}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


@dataclass(frozen=True)
class Instance:
    """One question of a benchmark.

    Attributes:
        dataset, index, question: as in the file.
        answers: references in the file's order, with repetitions (TextVQA has ten); empty if withheld.
        options: text per letter of a multiple-choice question; none of an open question. As in VLMEvalKit, without options
            whose text pandas reads as a missing value, such as "None".
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
        (fAcc) and whole questions (qAcc). MMBench: the rotations of a question. Other benchmarks: each question is a group.
        """
        if BENCHMARKS[self.dataset].circular:
            return (circular_group(self.index, self.fields.get("g_index")),)
        if self.dataset == "MME":
            return (self.fields["category"], self.fields["image_path"])
        if self.dataset == "HallusionBench":
            return (self.fields["l2-category"], self.index.split("_")[3])
        return (self.index,)


def instance(benchmark: Benchmark, table: TsvTable, row: TsvRow) -> Instance:
    """A row of the benchmark's file as an instance without images. UserError if a value is missing or wrong."""
    for name in benchmark.needed:
        if row.value(name) is None and name not in (benchmark.answer_column, *_MAY_BE_EMPTY):
            raise UserError(f"{table.where(row, name)}: missing")
    options = _texts(row, LETTERS) if benchmark.task == "choice" else {}
    if benchmark.task == "choice" and not options and benchmark.name != MMMU:
        raise UserError(f"{table.where(row, 'A')}: no option has a text")
    if benchmark.name == "HallusionBench" and len(row.index.split("_")) < 6:
        raise UserError(
            f"{table.where(row, 'index')}: must have six parts joined by _, the last three of them the ids of "
            "set, figure and question"
        )
    for name in ("index", "g_index") if benchmark.circular else ():
        if not (row.index if name == "index" else row.value(name) or "0").isdecimal():
            raise UserError(f"{table.where(row, name)}: must be a whole number, which tells the rotations of a question")
    others = [name for name in (*benchmark.columns, *benchmark.optional) if name not in LETTERS]
    return Instance(
        dataset=benchmark.name,
        index=row.index,
        question=row.cells["question"],
        answers=_answers(benchmark, table, row),
        options=options,
        fields=_texts(row, others),
    )


def all_instances(benchmark: Benchmark, table: TsvTable) -> list[Instance]:
    """All rows of the benchmark's file, as by `instance`. UserError also if a question lacks a rotation of its options."""
    items = [instance(benchmark, table, row) for row in table.rows]
    if benchmark.circular:
        try:
            check_rotations((item.group[0], item.index, len(item.options)) for item in items)
        except UserError as error:
            raise UserError(f"{table.path}: {error}") from None
    return items


def _texts(row: TsvRow, columns: Sequence[str]) -> dict[str, str]:
    return {name: text for name in columns if (text := row.value(name)) is not None}


def _answers(benchmark: Benchmark, table: TsvTable, row: TsvRow) -> tuple[str, ...]:
    if benchmark.answers == "none":
        return ()
    where = table.where(row, benchmark.answer_column)
    text = row.cells[benchmark.answer_column]
    if not text:
        raise UserError(f"{where}: missing")
    if row.value(benchmark.answer_column) is None:
        return ("nan",)  # "None" and the like: VLMEvalKit turns a missing value into this text and scores against it
    if benchmark.answers == "text" or not text.startswith("["):
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
    images: tuple[int, ...] | None = None
    """Places of the images among those of the instance, in the order of the marks; None for all of them."""

    def sample(self, item: Instance, answers: tuple[str, ...]) -> Sample:
        """The instance as a sample with this turn, and `answers`, each `normalised`."""
        images = item.images if self.images is None else tuple(item.images[place] for place in self.images)
        return Sample(item.id, item.dataset, images, self.text, answers, self.marked, as_stored=True)


def default_prompt(instance: Instance) -> Turn:
    """The prompt of a model that has none of its own in VLMEvalKit."""
    if is_choice(instance):
        text = question_and_options(instance) + (f"{SELECT} \n" if instance.options else "")
        return _interleaved(text, instance) if instance.dataset == MMMU else Turn(text)
    if BENCHMARKS[instance.dataset].task == "vqa" and instance.dataset not in ("OCRBench", "VizWiz"):
        return Turn(f"{instance.question}\n{SHORT_ANSWER}")
    return Turn(instance.question)


def _interleaved(text: str, instance: Instance) -> Turn:
    """The text with each image where it is mentioned: "<image 2>" is the place of the second.

    Images that are not mentioned are left out, those mentioned twice are there twice. Without any mention, all come first.
    """
    mentioned = tuple(int(number) - 1 for number in _IMAGE_NUMBER.findall(text))
    if not mentioned:
        return Turn(text)
    if absent := set(mentioned) - set(range(len(instance.images))):
        raise UserError(f"{instance.id}: mentions <image {max(absent) + 1}>, but has {len(instance.images)} images")
    if IMAGE_MARK in text:
        raise UserError(f"{instance.id}: {IMAGE_MARK} in its text cannot be told from the places of its images")
    return Turn(_IMAGE_NUMBER.sub(IMAGE_MARK, text), True, mentioned)


def is_choice(instance: Instance) -> bool:
    """Whether the question is of a benchmark of multiple choice. MMMU has a few open ones, without options."""
    return BENCHMARKS[instance.dataset].task == "choice"


def hint(instance: Instance, label: str) -> list[str]:
    """The line of the hint; no line without a hint."""
    return [f"{label}{instance.fields['hint']}"] if "hint" in instance.fields else []


def options(instance: Instance) -> list[str]:
    """One line per option."""
    return [f"{letter}. {text}" for letter, text in instance.options.items()]


def question_and_options(instance: Instance) -> str:
    """Hint, question and options if there are any, one per line."""
    heading = ("Options:",) if instance.options else ()
    lines = (*hint(instance, "Hint: "), f"Question: {instance.question}", *heading, *options(instance))
    return "".join(f"{line}\n" for line in lines)


def choice_by_letter(instance: Instance) -> str:
    """The multiple-choice prompt of InternVL and of LLaVA-1.5 and LLaVA-NeXT in VLMEvalKit."""
    text = "\n".join((*hint(instance, ""), instance.question, *options(instance)))
    if not instance.options:
        return f"{text}\n{ANSWER_DIRECTLY}"
    return f"{text}\n{CHINESE_LETTER if is_chinese(text) else ANSWER_LETTER}"


def is_chinese(text: str) -> bool:
    """Whether the text contains a Chinese character."""
    return re.search("[\u4e00-\u9fff]", text) is not None
