"""VLMEvalKit's removal of punctuation, which TextVQA and the yes/no benchmarks share (`vlmeval/smp/misc.py`)."""

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD_WITHOUT_DIGIT = re.compile(r"(?<!\d)\.(?!\d)")

# VLMEvalKit passes `re.UNICODE` where `re.sub` takes the number of replacements, and `re.UNICODE` is 32. A 33rd
# period stays; published numbers have it so.
_PERIODS_REMOVED = 32


def remove_punctuation(text: str) -> str:
    r"""The text without the marks ; / [ ] " { } ( ) = + \ _ - > < @ ` , ? ! and without periods beside no digit.

    A mark that anywhere touches a blank is deleted everywhere; one that never does becomes a blank. Both are
    decided on the text as given. A comma between two digits, anywhere, has all marks deleted. Apostrophes,
    colons and asterisks are none of the marks.
    """
    deletes_all = _COMMA_BETWEEN_DIGITS.search(text) is not None
    result = text
    for mark in _MARKS:
        deleted = deletes_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if deleted else " ")
    return _PERIOD_WITHOUT_DIGIT.sub("", result, count=_PERIODS_REMOVED)
