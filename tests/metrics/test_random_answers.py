"""10,000 random answers per metric against the published rules, written down once more as plainly as possible.

VLMEvalKit cannot be installed beside this package, so its functions are not called here; the transcriptions follow its rules as
published, and share no code with ours. Each test also says how many answers are right, so that the draws cannot become trivial.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import pytest

from rlens_jax.metrics.choice_metrics import POPE_CATEGORIES, extract_choice, extract_yes_no
from rlens_jax.metrics.score import RULES, Row
from rlens_jax.metrics.scorers import SCORERS, score
from rlens_jax.metrics.text_metrics import FORMULA, normalise_answer

pytestmark = pytest.mark.slow

DRAWS = 10_000
LETTER_PIECES = (
    *"ABCDEZabd", "(B)", "**C**", "A.", "D:", '"A"', "answer is", "The answer is", "Answer:", "correct answer is **", "is", "it",
    "dog", "red", "Red bus", "bus", "blue", "blue car", "no", "none", "1", "10", "12", ",", ".", "\n",
    "because of what one can see here",
    "Cannot determine the answer", "Failed to obtain answer via API", "I can't process this file.", "",
)  # fmt: skip
OPTION_TEXTS = ("red", "Red bus", "blue", "blue car", "no", "None of them", "1", "10", "dog", "A", "is it")
SPOKEN = (
    "yes", "Yes", "YES.", "no", "No,", "not", "there is", "maybe", "-", "/", ";", ":", "'", "1,000", ".", "...", "**", "(", ")",
    "?", "\n",
)  # fmt: skip
WORDS = (
    "blue", "Blue.", "the", "a", "An", "light", "two", "2", "ten", "none", "dont", "isn't", "-", "/", ",", ".", "1,000", "3.5",
    "?", "(x)", "cup\n", "\tcup", "x-ray", "co,la", "end.", "a.m.", "",
)  # fmt: skip
NUMBERS = (
    "7",
    "7.3",
    "7.4",
    "6.7",
    "0",
    "0.0",
    "100",
    "95.2",
    "105.2",
    "105",
    "95",
    "5%",
    "0.05",
    "-7",
    "1e2",
    "x",
    "X ",
    "1,000",
    "nan",
)


def phrase(draw: random.Random, pieces: Sequence[str], most: int) -> str:
    """Some pieces, mostly with blanks between them."""
    text = ""
    for _ in range(draw.randint(0, most)):
        text += draw.choice(pieces) + draw.choice((" ", " ", " ", ""))
    return text


# The rules of multiple choice.


def plain_choice(said: str, options: Mapping[str, str], rules: str) -> str | None:
    """The chosen letter; None for none."""
    old = rules == "2025-01"
    if "Failed to obtain answer via API" not in said:
        refusals = ("Sorry, I can't help with images of people yet.", "I can't process this file.")
        for refusal in (*refusals, "I'm sorry, but without the image provided", "Cannot determine the answer"):
            if refusal in said:
                return None
        tokens = re.split(r"\s+", re.sub(r"[.()\[\],:;!*#{}]", " ", said).strip())
        found = {token for token in tokens if token in options}
        if len(found) == 1:
            (letter,) = found
            if old or (letter in tokens[-4:] and letter not in tokens[:-4]):
                return letter
        if not found and "Z" in tokens:
            return None
        verbose = re.search(r"(?i)answer\s+is\s+\**([ABCD])", said)
        if verbose and not old and verbose.group(1).upper() in options:
            return verbose.group(1).upper()
    if not old and len(said) > 2 * len("".join(options.values())):
        return None
    inside = [letter for letter in options if options[letter].lower() in said.lower()]
    return inside[0] if len(inside) == 1 else None


def random_options(draw: random.Random) -> dict[str, str]:
    """Two to six options; a letter may be missing."""
    letters = [letter for letter in "ABCDEF"[: draw.randint(2, 6)] if draw.random() > 0.05] or ["A"]
    return dict(zip(letters, draw.sample(OPTION_TEXTS, len(letters)), strict=True))


@pytest.mark.parametrize("rules", RULES)
def test_multiple_choice(rules: str):
    draw = random.Random(f"choice {rules}")
    chosen = []
    for _ in range(DRAWS):
        said, options = phrase(draw, LETTER_PIECES, 5), random_options(draw)
        expected = plain_choice(said, options, rules)
        assert extract_choice(said, options, RULES[rules]) == (expected or "Z"), (said, options)
        chosen.append(expected)
    assert set(chosen) == {None, *"ABCDEF"}
    assert DRAWS * 0.2 < chosen.count(None) < DRAWS * 0.8


@pytest.mark.parametrize("rules", RULES)
def test_open_questions(rules: str):
    """MMMU: 10,000 rows, of which half have no options."""
    draw = random.Random(f"open {rules}")
    right = 0.0
    for _ in range(DRAWS):
        options = {} if draw.random() < 0.5 else random_options(draw)
        reference = draw.choice((*OPTION_TEXTS, "3.5", *"ABC")) if not options or draw.random() < 0.1 else draw.choice([*options])
        said = phrase(draw, (*LETTER_PIECES, "Other answers", "3.5"), 4)
        known = dict(options)
        if "A" not in options:
            known["A"], known["B"] = reference, "Other Answers"
        letter = reference if re.fullmatch("[A-Z]", reference) else "A"
        expected = plain_choice(said, dict(sorted(known.items())), rules) == letter
        row = Row("0", said, (reference,), options=options)
        assert SCORERS["MMMU_DEV_VAL"].sample(row, RULES[rules]) == expected, (said, options, reference)
        right += expected
    assert DRAWS * 0.05 < right < DRAWS * 0.95


def test_circular_groups():
    """MMBench: files of 20 questions; most answers are right, or no question would be."""
    draw, rows_seen, scores = random.Random("circular"), 0, []
    while rows_seen < DRAWS:
        rows, right = [], 0
        for question in range(20):
            texts = draw.sample(OPTION_TEXTS, draw.randint(2, 4))
            all_right = True
            for k in range(len(texts)):
                options = dict(zip("ABCD", texts[k:] + texts[:k], strict=False))
                answer = next(letter for letter in options if options[letter] == texts[0])
                said = answer if draw.random() < 0.8 else phrase(draw, LETTER_PIECES, 3)
                all_right = all_right and plain_choice(said, options, "2026-08") == answer
                rows.append(Row(str(question + 1_000_000 * k), said, (answer,), options=options))
            right += all_right
        draw.shuffle(rows)
        assert score("MMBench_DEV_EN", rows).value == pytest.approx(100 * right / 20, abs=1e-9)
        scores.append(right)
        rows_seen += len(rows)
    assert len(set(scores)) > 5


# Yes and no.


def plain_punctuation(text: str) -> str:
    """The marks of the VQA evaluation."""
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        if mark + " " in text or " " + mark in text or re.search(r"(\d)(,)(\d)", text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    periods, kept = 0, ""
    for place, letter in enumerate(out):
        beside_digit = re.match(r"\d", out[place - 1 : place] or " ") or re.match(r"\d", out[place + 1 : place + 2] or " ")
        if letter == "." and not beside_digit and periods < 32:
            periods += 1
        else:
            kept += letter
    return kept


@cache
def plain_yes_no(said: str) -> str:
    words = plain_punctuation(said.lower()).split()
    if "yes" in words and "no" not in words:
        return "Yes"
    if "no" in words and "yes" not in words:
        return "No"
    return "Unknown"


def test_yes_and_no():
    draw = random.Random("yes")
    found = []
    for _ in range(DRAWS):
        said = phrase(draw, SPOKEN, 5)
        found.append(plain_yes_no(said))
        assert extract_yes_no(said) == found[-1], said
    assert all(found.count(word) > DRAWS * 0.1 for word in ("Yes", "No", "Unknown"))


def test_pope():
    """Files of 1 to 20 rows: F1, accuracy, precision and recall of all rows and of each category."""
    draw, rows_seen, scores = random.Random("pope"), 0, set()
    while rows_seen < DRAWS:
        rows = []
        for n in range(draw.randint(1, 20)):
            names = draw.sample(POPE_CATEGORIES, draw.randint(1, 3))
            category = None if draw.random() < 0.05 else ",".join(names)
            rows.append(Row(str(n), phrase(draw, SPOKEN, 2), (draw.choice(("Yes", "No")),), category=category))
        result = score("POPE", rows)
        exploded = [(row, name) for row in rows for name in (row.category.split(",") if row.category else [None])]
        for name in (None, *POPE_CATEGORIES):
            of_name = [row for row, other in exploded if name in (None, other)]
            key = "" if name is None else f"category/{name}"
            if not of_name:
                assert key not in result.breakdown
                continue
            positive = [row for row in of_name if row.answers[0] == "Yes"]
            said = [row for row in of_name if plain_yes_no(row.prediction) == "Yes"]
            both = len([row for row in positive if plain_yes_no(row.prediction) == "Yes"])
            precision, recall = both / len(said) if said else 0, both / len(positive) if positive else 0
            f1 = 2 * precision * recall / (precision + recall) if both else 0
            right = len([row for row in of_name if plain_yes_no(row.prediction) == row.answers[0]])
            assert abs((result.breakdown[key] if key else result.value) - 100 * f1) < 1e-9
            for part, value in (("acc", right / len(of_name)), ("precision", precision), ("recall", recall)):
                assert abs(result.breakdown[f"{key}/{part}" if key else part] - 100 * value) < 1e-9
            scores.add(round(f1, 6))
        rows_seen += len(rows)
    assert len(scores) > 50


# Texts.


@cache
def plain_normal(text: str) -> str:
    """The normal form of the VQA evaluation, with the contractions that occur in `WORDS`."""
    text = plain_punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower()
    digits = {"none": "0", "two": "2", "ten": "10"}
    words = [digits.get(word, word) for word in text.split()]
    return " ".join({"dont": "don't"}.get(word, word) for word in words if word not in {"a", "an", "the"})


def plain_vqa(said: str, answers: Sequence[str]) -> float:
    answers, total = [plain_normal(answer) for answer in answers], 0.0
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        total += min(1, others.count(plain_normal(said)) / 3)
    return total / len(answers)


def plain_gqa(said: str, answers: Sequence[str]) -> float:
    return sum(1.0 for answer in answers if answer.lower().strip() == said.lower().strip()) / len(answers)


def plain_contained(said: str, answers: Sequence[str]) -> float:
    return float(any(answer.lower().strip().replace("\n", " ") in said.lower().strip().replace("\n", " ") for answer in answers))


def plain_formula(said: str, answers: Sequence[str]) -> float:
    said, *answers = (text.strip().replace("\n", " ").replace(" ", "") for text in (said, *answers))
    return float(any(answer in said for answer in answers))


def plain_anls(said: str, answers: Sequence[str]) -> float:
    distances = []
    for answer in answers:
        one, other = (" ".join(text.strip().lower().split()) for text in (answer, said))
        rows = [list(range(len(other) + 1))]
        for i, letter in enumerate(one, 1):
            rows.append([i])
            for j, second in enumerate(other, 1):
                rows[i].append(min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (letter != second)))
        longest = max(len(answer), len(said))
        distances.append(rows[-1][-1] / longest if longest else 0)
    return 1 - min(distances) if 1 - min(distances) >= 0.5 else 0.0


def plain_relaxed(said: str, answers: Sequence[str], *, old: bool = False) -> float:
    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    for answer in answers:
        given, target = number(said.strip()), number(answer)
        if old:
            given, target = target, given
        if given is not None and target:
            if abs(given - target) / abs(target) <= 0.05:
                return 1.0
        elif said.strip().lower() == answer.lower():
            return 1.0
    return 0.0


TEXTS: dict[str, tuple[str, Callable[[Sequence[str], str], Row], Callable[..., float], Sequence[str], int, int]] = {
    "vizwiz": ("VizWiz", lambda answers, said: Row("0", said, tuple(answers)), plain_vqa, WORDS, 2, 10),
    "gqa": ("GQA_TestDev_Balanced", lambda answers, said: Row("0", said, tuple(answers)), plain_gqa, WORDS, 1, 2),
    "anls": ("DocVQA_VAL", lambda answers, said: Row("0", said, tuple(answers)), plain_anls, WORDS, 3, 2),
    "relaxed": ("ChartQA_TEST", lambda answers, said: Row("0", said, tuple(answers)), plain_relaxed, NUMBERS, 1, 2),
    "contained": (
        "OCRBench",
        lambda answers, said: Row("0", said, tuple(answers), category="Digit String Recognition"),
        plain_contained,
        WORDS,
        2,
        2,
    ),
    "formula": ("OCRBench", lambda answers, said: Row("0", said, tuple(answers), category=FORMULA), plain_formula, WORDS, 2, 2),
}
"""Dataset, row, plain rule, pieces, most pieces of an answer, number of references."""


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str):
    dataset, row, plain, pieces, most, references = TEXTS[name]
    draw, total = random.Random(name), 0.0
    for _ in range(DRAWS):
        pool = [phrase(draw, pieces, most) for _ in range(3)]
        answers, said = [draw.choice(pool) for _ in range(references)], draw.choice([*pool, phrase(draw, pieces, most)])
        if draw.random() < 0.1:
            said = f" {said.upper()}\n"
        expected = plain(said, answers)
        assert abs(SCORERS[dataset].sample(row(answers, said)) - expected) < 1e-12, (said, answers)
        total += expected
    assert DRAWS * 0.1 < total < DRAWS * 0.9


def test_relaxed_accuracy_of_2025():
    draw, differ = random.Random("old"), 0
    for _ in range(DRAWS):
        answers, said = [draw.choice(NUMBERS) for _ in range(2)], draw.choice(NUMBERS)
        expected = plain_relaxed(said, answers, old=True)
        row = Row("0", said, tuple(answers))
        assert SCORERS["ChartQA_TEST"].sample(row, RULES["2025-01"]) == expected, (said, answers)
        differ += expected != plain_relaxed(said, answers)
    assert differ > 50


def test_the_normal_form():
    """Of 10,000 texts, which scores of 0 and 1 alone would hide."""
    draw = random.Random("normal")
    texts = [phrase(draw, WORDS, 5) for _ in range(DRAWS)]
    assert [normalise_answer(text) for text in texts] == [plain_normal(text) for text in texts]
