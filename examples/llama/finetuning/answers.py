r"""Finds final answers in worked solutions, and decides whether two are the same.

A model's answer is the text after the last "The answer is", else the last \boxed{}, else (numbers only) the
last number. A reference may also mark it with "####", as GSM8K does. Numbers are compared exactly; other
answers as LaTeX up to spelling. Two forms of an expression that is not a number (x+1 and 1+x) count as
different.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Literal

AnswerKind = Literal["number", "math"]

_STATED = re.compile(r"the\s+(?:final\s+)?answer\s+is\s*:?", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+(?:/\d+)?")


def find_answer(text: str, kind: AnswerKind = "math") -> str | None:
    r"""Returns the final answer in a text, as written, or None.

    Args:
        text: A worked solution.
        kind: With `number` the result is a number, if necessary the last one of the text.

    >>> find_answer("3 + 4 = 7, then half.\nThe answer is: 3.5.", "number")
    '3.5'
    >>> find_answer(r"so the area is $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> find_answer("He pays 3 * 4 = 12 dollars", "number")
    '12'
    """
    marked = None
    stated = list(_STATED.finditer(text))
    if stated:
        rest = text[stated[-1].end() :].strip()
        marked = boxed(rest) or (rest.splitlines()[0].strip() if rest else None)
    elif "####" in text:
        marked = text.rsplit("####", 1)[1].strip()
    else:
        marked = boxed(text)
    if kind == "math":
        return marked or None
    numbers = _NUMBER.findall((text if marked is None else marked).replace("\\!", ""))
    if not numbers:
        return None
    # After a marker the first number is the answer ("12 apples in 3 days"), otherwise the last.
    return numbers[-1] if marked is None else numbers[0]


def boxed(text: str) -> str | None:
    r"""Returns the content of the last \boxed{} or \fbox{} of a text, with matched braces.

    >>> boxed(r"\boxed{1} and \boxed{x^{2}}")
    'x^{2}'
    """
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = depth_from = text.index("{", start) + 1
    depth = 1
    for i in range(depth_from, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return None


def same_answer(given: str | None, reference: str | None) -> bool:
    r"""Whether two answers are the same number or, after `normalized`, the same LaTeX.

    >>> same_answer("1,000.0", "1000"), same_answer(r"\dfrac12", r"\frac{1}{2}")
    (True, True)
    >>> same_answer("0.5", r"\frac{1}{2}"), same_answer(None, "3")
    (True, False)
    """
    if given is None or reference is None:
        return False
    left, right = normalized(given), normalized(reference)
    if left == right:
        return bool(left)
    one, two = number(left), number(right)
    return one is not None and one == two


def number(text: str) -> Fraction | None:
    r"""The exact value of a plain number or fraction, else None.

    >>> number("-2.50"), number(r"\frac{3}{4}"), number("x")
    (Fraction(-5, 2), Fraction(3, 4), None)
    """
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}$", r"\1\2/\3", text).replace("--", "")
    # 1,000 is a number, (1,2) and 1,2 are not.
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def normalized(answer: str) -> str:
    r"""Removes what does not change the meaning of LaTeX: spaces, sizes, units, dollar signs, a final stop.

    >>> normalized(r"$x = \left( 3, \tfrac{\pi}2 \right)$.")
    '(3,\\frac{\\pi}{2})'
    >>> normalized(r"12\text{ cm}^2"), normalized(r"45^\circ"), normalized("50\\%")
    ('12', '45', '50')
    """
    text = answer.strip().rstrip(".").strip().strip("$").strip()
    text = re.sub(r"\\(?:left|right|big|Big|bigg|Bigg)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[!,;: ]|\\quad|~", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree|\\%|%|\\\$|\$", "", text)
    # A unit after a number; text alone is the answer itself.
    text = re.sub(r"(?<=[\d}])\s*\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?$", "", text)
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*", "", text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\{[^{}]*\})(\w)", r"\\frac\1{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    return re.sub(r"(?<!\d)\.(?=\d)", "0.", text)


def wilson_interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion, by default at 95 %.

    Raises:
        ValueError: There is nothing to count, or more is correct than there is.

    >>> [round(x, 3) for x in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if not 0 <= correct <= count or count == 0:
        raise ValueError(f"need 0 <= correct <= count and count > 0, got {correct} of {count}")
    share = correct / count
    centre = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)
