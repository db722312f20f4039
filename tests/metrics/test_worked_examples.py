"""The worked examples of the benchmarks' rules: every prediction whose score was computed by hand and by VLMEvalKit."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from PIL import Image

from rlens_jax.data.images import load_image
from rlens_jax.errors import UserError
from rlens_jax.metrics.choice_metrics import extract_choice, extract_yes_no
from rlens_jax.metrics.score import RULES, Row
from rlens_jax.metrics.scorers import SCORERS, score

Case = tuple[str, Callable[[], Any], Any]
OLD, NEW = "2025-01", "2026-08"
COLOURS = {"A": "A red bus", "B": "A blue car", "C": "Two dogs", "D": "None of these"}
YES_NO = {"A": "Yes", "B": "No"}
SIX = dict(zip("ABCDEF", ("one", "two", "three", "four", "five", "six"), strict=True))


def choices(options: Mapping[str, str], expected: Mapping[str, str], rules: str = NEW) -> list[Case]:
    """The chosen letters; "-" is none."""
    return [
        (f"{rules} {text}", partial(extract_choice, text, options, RULES[rules]), "Z" if letter == "-" else letter)
        for text, letter in expected.items()
    ]


def samples(dataset: str, answers: Sequence[str], expected: Mapping[str, float], rules: str | None = None) -> list[Case]:
    """The scores of single answers."""
    sample = SCORERS[dataset].sample if rules is None else partial(SCORERS[dataset].sample, rules=RULES[rules])
    return [
        (f"{dataset} {answers[0]} {text}", partial(sample, Row("0", text, tuple(answers))), value)
        for text, value in expected.items()
    ]


def spread(answer: Mapping[str, int]) -> list[str]:
    """So many times each answer."""
    return [text for text, times in answer.items() for _ in range(times)]


def pope(rows: Sequence[tuple[str, str, str]], expected: str, **of_category: str) -> Case:
    """F1 / acc / P / R of rows of category, answer, prediction; and of categories by their first letters."""
    names = {"a": "adversarial", "p": "popular", "r": "random"}
    given = [
        Row(str(n), prediction, (answer,), category=names.get(category, category))
        for n, (category, answer, prediction) in enumerate(rows)
    ]

    def compute() -> list[float]:
        result = score("POPE", given)
        values = [result.value, *(result.breakdown[name] for name in ("acc", "precision", "recall"))]
        values = values[: len(expected.split("/"))]
        for letter, text in of_category.items():
            prefix = f"category/{names[letter]}"
            parts = (prefix, *(f"{prefix}/{name}" for name in ("acc", "precision", "recall")))
            values += [result.breakdown[name] for name in parts[: len(text.split("/"))]]
        return values

    numbers = [float(number) for text in (expected, *of_category.values()) for number in text.split("/")]
    return (f"POPE {rows}", compute, numbers)


def circular(
    predictions: Sequence[str], value: float, names: Sequence[str] = ("cat", "dog", "cow"), answer: str = "dog", first: int = 0
) -> Case:
    """The score in percent of one question, from its rotation `first` on; each rotation moves the options by one letter."""
    rows = []
    for k, text in enumerate(predictions, first):
        options = {letter: names[(place + k) % len(names)] for place, letter in enumerate("ABC"[: len(names)])}
        (letter,) = (letter for letter, name in options.items() if name == answer)
        rows.append(Row(str(7 + k * 10**6), text, (letter,), options=options))
    return (f"circular {predictions}", lambda: score("MMBench_DEV_EN", rows).value, value)


def transparent() -> tuple[int, ...]:
    """The colour that a fully transparent pixel has when it is read."""
    file = io.BytesIO()
    Image.new("RGBA", (1, 1), (10, 20, 30, 0)).save(file, "png")
    return load_image(file.getvalue(), "it", "dropped", upright=False).getpixel((0, 0))  # type: ignore[return-value]


LONG = "The correct answer is **C**. Then ten more words are written here to make it long"
BLUE = {"blue": 4, "light blue": 2, "unanswerable": 3, "grey": 1}
CASES: list[Case] = [
    *choices(
        COLOURS,
        {
            "B": "B", "B.": "B", "(B)": "B", "**B**": "B", "b": "-", "Answer: B": "B", "\\boxed{C}": "C", "$C$": "-",
            '"C"': "-", "C。": "-", "C\uff1a": "-", "选项C": "-", "C-": "-", "<answer>C</answer>": "-", "E": "-", "": "-",
            "Z": "Z", "A or B": "-", "B\nC": "-", "B, since": "B", "It is a blue car.": "B", "Option B: A blue car": "B",
            "two dogs and a blue car": "-", "A photo of two dogs": "C", "A dog is what I see here, B": "-",
            "I think it is B because the car is blue": "-", "The answer: C is right here in it": "-",
            "The answer is d": "D", "the answer is A red bus": "A", LONG: "C", "Cannot determine the answer": "Z",
        },
    ),
    *choices(
        COLOURS, {"I think it is B because the car is blue": "B", "The answer: C is right here in it": "C"}, OLD
    ),
    *choices(
        YES_NO, {"no": "B", "Nothing": "B", "There is no dog": "-", "yes it is": "A", "yes it is so": "-", "a": "-"}
    ),
    *choices(YES_NO, {"There is no dog": "B"}, OLD),
    *choices({"A": "left", "B": "left-most", "C": "right"}, {"left-most": "-", "left": "A"}),
    # The notes have none for "12", but it has the text of one option, as "Nothing" has above.
    *choices({"A": "1", "B": "10"}, {"10": "-", "1": "A", "12": "A"}),
    *choices(
        SIX,
        {
            "F": "F", "answer is E": "E", "The answer is F and that is all there is to it": "-",
            "The answer is B and that is all there is to it": "B",
        },
    ),
    circular(["B", "A", "C"], 100),
    circular(["B", "A", "B"], 0),
    circular(["B", "I cannot tell", "C"], 0),
    circular(["dog", "dog", "dog"], 100),
    circular(["b", "A", "C"], 0),
    circular(["A", "A", "A"], 0),
    circular(["B.", "(A)", "Answer: C"], 100),
    circular(["B", "A or C", "C"], 0),
    circular(["Z", "A", "C"], 0),
    circular(["B", "", "C"], 0),
    circular(["It is the dog", "a dog", "DOG"], 100),
    circular(["The answer is B", "answer is a", "answer is c"], 100),
    circular(["A", "B"], 100, ("yes", "no"), "yes"),
    circular(["A", "A"], 0, ("yes", "no"), "yes"),
    *(
        (f"yes or no: {text}", partial(extract_yes_no, text), expected)
        for expected, texts in {
            "Yes": ("Yes", "yes.", "Yes, there is a dog.", '"Yes"', "Yes-", "<answer>yes</answer>"),
            "No": ("No", "no,", "NO!", "(no)", "There is no dog", "Answer: No"),
            "Unknown": (
                "Yes and no", "yes/no", "No;yes", "no-one, yes", "Yeah", "Y", "not", "there is not", "maybe", "**Yes**", "Yes:",
                "yes'", "Yes.No", "1,000 yes,sir",
            ),
        }.items()
        for text in texts
    ),
    pope([("r", "Yes", "yes"), ("r", "No", "no")], "100/100/100/100"),
    pope([("r", "Yes", "no"), ("r", "No", "no")], "0/50/0/0"),
    pope([("r", "Yes", "yes"), ("r", "No", "yes")], "66.67/50/50/100"),
    pope([("r", "No", "no")], "0/100/0/0"),
    pope([("r", "Yes", "maybe")], "0/0/0/0"),
    pope([("r", "No", "maybe")], "0/0/0/0"),
    pope([*[("p", "Yes", "Yes.")] * 3, ("p", "No", "Yes")], "85.71/75/75/100"),
    pope([("p", "Yes", "**Yes**"), ("p", "Yes", "Yes")], "66.67/50/100/50"),
    pope([("r", "Yes", "Yes and no"), ("r", "Yes", "Yes")], "66.67/50/100/50"),
    pope(
        [
            ("a", "Yes", "yes"), ("a", "Yes", "yes"), ("a", "Yes", "no"), ("a", "No", "yes"), ("a", "No", "no"),
            ("a", "No", "no"),
        ],
        "66.67/66.67/66.67/66.67",
    ),
    pope(
        [("adversarial,popular,random", "Yes", "yes"), ("a", "No", "yes")],
        "85.71/75/75/100", a="66.67/50", p="100/100", r="100/100",
    ),
    pope(
        [
            ("adversarial,popular", "Yes", "yes"), ("r", "No", "no"), ("a", "Yes", "no"), ("p", "No", "Yes, one"),
            ("r", "No", "maybe"),
        ],
        "66.67/50/66.67/66.67", a="66.67/50/100/50", p="66.67/50/50/100", r="0/50/0/0",
    ),
    *samples("GQA_TestDev_Balanced", ["left"], {"left": 1, " Left\n": 1, "left.": 0, '"left"': 0}),
    *samples("GQA_TestDev_Balanced", ["yes"], {"Yes, it is": 0}),
    *samples("GQA_TestDev_Balanced", ["bus"], {"the bus": 0}),
    *samples("GQA_TestDev_Balanced", ["2"], {"two": 0}),
    *samples("GQA_TestDev_Balanced", ["man"], {"men": 0}),
    *samples("GQA_TestDev_Balanced", ["white"], {"White": 1}),
    *samples("GQA_TestDev_Balanced", ["no"], {"NO": 1}),
    *samples("GQA_TestDev_Balanced", ["teddy bear"], {"teddy  bear": 0}),
    *samples("GQA_TestDev_Balanced", ["shelf"], {"shelf\u00a0": 1}),
    *samples("GQA_TestDev_Balanced", ["a", "b"], {"a": 0.5}),
    *samples(
        "VizWiz",
        spread(BLUE),
        {
            "blue": 1, "Blue.": 1, "The blue": 1, "blue\n": 1, "light blue": 0.6, "Light-blue": 0.6, "light blue.": 0.6,
            "Unanswerable": 0.9, "grey": 0.3, "gray": 0, "unsuitable": 0, "": 0,
        },
    ),
    *(
        case
        for answer, text, value in (
            ("one", "1", 1), ("a cup", "cup", 1), ("1,000", "1000", 1), ("coca-cola", "coca cola", 1),
            ("coca-cola can", "cocacola can", 0), ("12/05/2019", "12 05 2019", 1), ("3.5 oz", "3.5oz", 0), ("$5", "5", 0),
            ("don't know", "dont know", 1),
        )
        for case in samples("VizWiz", [answer] * 10, {text: value})
    ),
    *samples("VizWiz", ["cup", "cup"], {"cup": 1 / 3}),
    *samples("VizWiz", ["cup"], {"cup": 0}),
    *samples(
        "MMMU_DEV_VAL",
        ["3.5"],
        {
            "3.5": 1, "The answer is 3.5": 1, "3.50": 1, "13.5": 1, "$3.5$": 1, "a 3.5": 1, "A": 1, "B": 0,
            "Other answers": 0, "5": 0, "It must be about 3.5 metres and so on and so forth ok": 0,
            # The notes have 0 for this one, as too long, but it says "answer is a", which nothing ends.
            "The answer is about 3.5 metres and so on and so forth ok": 1,
        },
    ),
    *samples("MMMU_DEV_VAL", ["['24','24.0']"], {"24": 0}),
    *samples("ChartQA_TEST", ["100"], {"95.2": 1, "105.2": 0}, NEW),
    *samples("ChartQA_TEST", ["100"], {"95.2": 0, "105.2": 1}, OLD),
    ("a transparent pixel", transparent, (10, 20, 30)),
]  # fmt: skip


@pytest.mark.parametrize(("compute", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_worked_example(compute: Callable[[], Any], expected: Any):
    assert compute() == (pytest.approx(expected, abs=0.005) if isinstance(expected, list) else pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize(("first", "predictions", "rows"), [(0, "BA", "7, 1000007"), (1, "AC", "1000007, 2000007")])
def test_a_question_without_all_rotations_is_refused(first: int, predictions: str, rows: str):
    """VLMEvalKit gives the first the score 1, and does not count the second at all."""
    _, compute, _ = circular(list(predictions), 100, first=first)
    with pytest.raises(UserError, match=re.escape(f"MMBench_DEV_EN: question 7 has 2 of its 3 rotations (rows {rows})")):
        compute()


@pytest.mark.parametrize("category", ["adverserial", " popular", ""])
def test_an_unknown_category_of_pope_is_refused(category: str):
    rows = [Row("3", "yes", ("Yes",), category=f"adversarial,{category}")]
    with pytest.raises(UserError, match=f"POPE: row 3: unknown category {category!r}.*; known: adversarial, popular, random"):
        score("POPE", rows)
