"""Exact match of a response with the accepted answers.

What is compared: the whole response (behind </think>, where there is one); with a pattern, the first group (without
groups all) of the pattern's last match in it, and a response in which it matches nowhere is wrong. Both sides are
stripped, runs of white space are one space, and a full stop at the end does not count. Where both are numbers their
values are compared, "$", "%" and commas between thousands left out: "1,234.50" is 1234.5. Case counts.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation


def is_correct(text: str, answers: Sequence[str], pattern: re.Pattern[str] | None = None) -> bool:
    """Whether the response `text` comes to one of the accepted answers."""
    given = extract_answer(text, pattern)
    return given is not None and normalize(given) in {normalize(answer) for answer in answers}


def extract_answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """What of a response is compared; None if the pattern matches nowhere."""
    if pattern is None:
        return text
    matches = list(pattern.finditer(text))
    return matches[-1].group(1 if pattern.groups else 0) if matches else None


def normalize(text: str) -> str | Decimal:
    """The value of a number, otherwise the text itself, in the form in which answers are compared."""
    stripped = " ".join(text.split()).removesuffix(".").rstrip()
    try:
        value = Decimal(re.sub(r"(?<=\d),(?=\d{3}\b)", "", stripped.removeprefix("$").removesuffix("%")))
    except InvalidOperation:
        return stripped
    return value if value.is_finite() else stripped
