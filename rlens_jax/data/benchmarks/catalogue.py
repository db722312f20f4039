"""What the eight benchmarks are: columns, published sums, what belongs together, and a row as an instance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from types import MappingProxyType
from typing import Any, Literal

from rlens_jax.data.benchmarks.tsv import TsvRow, TsvTable, parse_list
from rlens_jax.errors import UserError, suggest

LETTERS = tuple(ascii_uppercase)
"""Columns of the options of a multiple-choice question (VLMEvalKit takes every single capital letter)."""
L2_CATEGORIES = ("l2-category", "l2_category")
"""Both spellings are in use."""


@dataclass(frozen=True)
class Benchmark:
    """One TSV file of VLMEvalKit."""

    name: str
    md5: str
    """Published by VLMEvalKit, in hex."""
    task: Literal["vqa", "yes_no", "choice"]
    answers: Literal["list", "single", "none"]
    """Whether `answer` is a list of references, one text (or a list that can be read as one), or withheld by the makers."""
    columns: tuple[str, ...] = ()
    """Needed besides index, question, answer and image."""
    strata: tuple[str, ...] = ()
    """Columns by which a sample of the benchmark is stratified."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that the file must have besides index and image."""
        return ("question", *(() if self.answers == "none" else ("answer",)), *self.columns)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are kept if they are there."""
        extra = ("category", *L2_CATEGORIES, "split", "image_path", "hint", *self.strata)
        options = LETTERS if self.task == "choice" else ()
        return tuple(name for name in dict.fromkeys((*extra, *options)) if name not in self.needed)


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        benchmark.name: benchmark
        for benchmark in (
            Benchmark(
                "OCRBench",
                "e953d98a987cc6e26ef717b61260b778",
                "vqa",
                "list",
                columns=("category",),
                strata=("category",),
            ),
            Benchmark("DocVQA_VAL", "d5ee77e1926ff10690d469c56b73eabf", "vqa", "list"),
            Benchmark("DocVQA_TEST", "6a2f28cac26ef2d3447374e8c6f6c8e9", "vqa", "none"),
            Benchmark("InfoVQA_VAL", "2342e9c225222f0ef4dec545ebb126fe", "vqa", "list"),
            Benchmark("InfoVQA_TEST", "df535bf51b88dc9718252c34131a6227", "vqa", "none"),
            Benchmark(
                "ChartQA_TEST",
                "c902e0aa9be5582a7aad6dcf52734b42",
                "vqa",
                "single",
                columns=("split",),
                strata=("split",),
            ),
            Benchmark("TextVQA_VAL", "b233b31f551bbf4056f2f955da3a92cd", "vqa", "list"),
            Benchmark(
                "MME",
                "b36b43c3f09801f5d368627fb92187c3",
                "yes_no",
                "single",
                columns=("category", "image_path"),
                strata=("category",),
            ),
            Benchmark(
                "MMStar",
                "e1ecd2140806c1b1bbf54b43372efb9e",
                "choice",
                "single",
                columns=("A", "B", "C", "D", "category"),
                strata=("category",),
            ),
            Benchmark(
                "HallusionBench",
                "0c23ac0dc9ef46832d7a24504f2a0c7c",
                "yes_no",
                "single",
                columns=("category", "l2-category"),
                strata=("category", "l2-category"),
            ),
        )
    }
)
"""By VLMEvalKit's names, which are the names of the files without `.tsv`."""


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name. UserError, with the nearest name, when there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}{suggest(name, BENCHMARKS)}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


@dataclass(frozen=True)
class Instance:
    """One question of a benchmark.

    answers: references, in the file's order and with repetitions (TextVQA has ten); empty where they are withheld.
    options: letter -> text, of a multiple-choice question. As in VLMEvalKit, an option whose text pandas takes for a missing
        value, such as "None", is left out.
    fields: further columns, such as `category`.
    images: encoded files, as they are in the TSV.
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
        """Unique in a run, such as "MME/12"."""
        return f"{self.dataset}/{self.index}"

    @property
    def stratum(self) -> tuple[str, ...]:
        """What a sample is stratified by."""
        return tuple(self.fields.get(name, "") for name in BENCHMARKS[self.dataset].strata)

    @property
    def group(self) -> tuple[str, ...]:
        """Equal for questions that a metric scores together, so that a sample must have all of them or none.

        MME: the two questions about an image (acc+). HallusionBench: the questions of a set, which has whole figures (fAcc)
        and whole questions (qAcc). All others: a group each.
        """
        if self.dataset == "MME":
            return (self.fields["category"], self.fields["image_path"])
        if self.dataset == "HallusionBench":
            return (self.fields["l2-category"], self.index.split("_")[3])
        return (self.index,)


def instance(benchmark: Benchmark, table: TsvTable, row: TsvRow) -> Instance:
    """A row of the benchmark's file, without its images.

    Raises UserError, naming file, row and field, for a value that is missing or not what the benchmark has there.
    """
    for name in benchmark.needed:
        if row.value(name) is None and name not in ("answer", *LETTERS):
            raise UserError(f"{table.where(row, name)}: missing")
    options = _texts(row, LETTERS) if benchmark.task == "choice" else {}
    if benchmark.task == "choice" and not options:
        raise UserError(f"{table.where(row, 'A')}: no option has a text")
    if benchmark.name == "HallusionBench" and len(row.index.split("_")) < 6:
        raise UserError(
            f"{table.where(row, 'index')}: must have six parts with _ between them, the last three being set, figure "
            "and question"
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
        return ("nan",)  # "None" and the like: what VLMEvalKit's str() makes of a missing value, and scores against
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
    """A command's option --md5 NAME=SUM in its two parts; `error` complains of it."""
    name, equals, md5 = text.partition("=")
    if not equals or len(md5) != 32:
        error(f"--md5 {text} must be NAME=SUM with 32 hexadecimal digits")
    return name, md5
