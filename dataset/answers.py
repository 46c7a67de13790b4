"""Read a written answer: its number, the option it names, whether it equals the gold answer, whether its form is right.

In a text that reasons first, the answer is inside the last mark: <answer>…</answer>, LaTeX's \\boxed{…}, or after
GSM8K's ####. Without a mark it is what follows </think>, or the whole text.
"""

import math
import re
import unicodedata
from fractions import Fraction

MARKED = re.compile(r"<answer>(.*?)(?:</answer>|$)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}|####(.*)", re.DOTALL)
REASONED = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")

LONGEST = 100  # characters of a number: a model that repeats a digit forever has not given one
UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
UNIT = "[百千]?(?:万亿|[万亿])|千(?![克米瓦卡伏帕焦赫牛]|字节|比特)|百(?![分货])"
PARTS = re.compile(rf"({UNSIGNED})({UNIT})")  # of a number like 3万5千
FRACTION = re.compile(rf"\\[dt]?frac\{{\s*([-+]?(?:{UNSIGNED}))\s*\}}\{{\s*({UNSIGNED})\s*\}}")
# A minus between two numbers is a subtraction, so it is a sign only if nothing stands before it.
ARABIC = re.compile(
    rf"(?P<percent>百分之)?(?P<sign>(?<![\w.)%])[-+]\s?|(?<=[^\x00-\x7f])[-+]|负)?"
    rf"(?P<larger>(?:(?:{UNSIGNED})(?:{UNIT}))*)(?P<first>{UNSIGNED})"
    rf"(?:[eE](?P<exponent>[-+]?\d{{1,2}})(?!\d)|\s+(?P<part>\d+)/(?P<of>\d+)|\s*/\s*(?P<divisor>{UNSIGNED}))?"
    rf"\s*(?P<unit>%|{UNIT})?"
)
DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
# 一样, 一起, 一定 and their like are no numbers
ONE = r"(?!一[样起定直般些切旦边同下再并向味])[零〇一二两三四五六七八九十]"
NUMERAL = rf"{ONE}(?:[零〇一二两三四五六七八九十百万亿]|千(?![克米瓦]))*"
CHINESE = re.compile(rf"(负)?(?:(百|{NUMERAL})分之)?({NUMERAL})(?:点([零〇一二三四五六七八九]+)({UNIT})?)?")


def answer_part(text: str) -> str:
    text = text.rpartition("</think>")[2]
    marks = list(MARKED.finditer(text))
    return next(part for part in marks[-1].groups() if part is not None) if marks else text


def _plain(text: str) -> str:
    """Return the answer with full-width and typographic forms of characters replaced by ASCII."""
    text = re.sub("([¼-¾⅐-⅞])", r" \1", answer_part(text))  # NFKC makes 11/2 of 1½
    return unicodedata.normalize("NFKC", text).replace("−", "-").replace("⁄", "/").strip()


# --- numbers ---------------------------------------------------------------------------------------------------------


def number(text: str) -> Fraction | None:
    """Return the last number of an answer: 1,234.5, -3/4, 1 1/2, 50%, 3.5万, 二十三, 百分之五, 三分之二; None if none.

    Numerals in Chinese characters count only if there are no digits, because 一 is also part of many words.
    """
    raw, percent = _read(text)
    return raw / 100 if raw is not None and percent else raw


def number_matches(answer: str, gold: str) -> bool:
    """Tell whether both numbers are equal. If only one has a percent sign, 50% equals both 50 and 0.5.

    Raises ValueError if gold has no number.
    """
    expected, expected_percent = _read(gold)
    if expected is None:
        raise ValueError(f"the gold answer {gold!r} holds no number")
    found, percent = _read(answer)
    if found is None:
        return False
    return found == expected or found * (1 if percent else 100) == expected * (1 if expected_percent else 100)


def _read(text: str) -> tuple[Fraction | None, bool]:
    """Return (the number as it is written, whether it is a percentage)."""
    text = FRACTION.sub(r" \1/\2", _plain(text)).replace("\\%", "%")
    text = re.sub(r"[$¥€£](?=\s?[\d.])", "", text)
    for match in reversed(list(ARABIC.finditer(text))):
        if len(match[0]) <= LONGEST and (value := _arabic(match)) is not None:
            return value, bool(match["percent"]) or match["unit"] == "%"
    for match in reversed(list(CHINESE.finditer(text))):
        if len(match[0]) <= LONGEST:
            sign, divisor, whole, decimals, unit = match.groups()
            value = Fraction(_chinese(whole))
            if decimals:
                value += Fraction(int("".join(str(DIGITS[digit]) for digit in decimals)), 10 ** len(decimals))
                value *= _times(unit)
            if divisor not in (None, "百"):
                value = value / _chinese(divisor) if _chinese(divisor) else None
            return (-value if sign and value is not None else value), divisor == "百"
    return None, False


def _arabic(match: re.Match) -> Fraction | None:
    _, sign, larger, first, exponent, part, of, divisor, unit = match.groups()
    value = Fraction(first.replace(",", "")) * Fraction(10) ** int(exponent or 0)
    below = Fraction((divisor or of or "1").replace(",", ""))
    if not below:
        return None
    value = value + Fraction(part) / below if part else value / below
    value = value * _times(unit) + sum(Fraction(n.replace(",", "")) * _times(u) for n, u in PARTS.findall(larger))
    return value * (-1 if (sign or "").strip() in ("-", "负") else 1)


def _times(unit: str | None) -> int:
    """Return what a unit multiplies by: 千万 by a thousand times ten thousand; "%" and none by one."""
    return math.prod(UNITS.get(character, 1) for character in unit or "")


def _chinese(text: str) -> int:
    """Return the value of a numeral; a digit right after a unit counts a tenth of it: 一百五 is 150, 三十五 is 35."""
    if not any(character in UNITS for character in text):
        return int("".join(str(DIGITS[character]) for character in text))  # 二〇二四
    total = section = digit = 0
    last_unit = 10
    for character in text:
        if character in UNITS:
            last_unit = UNITS[character]
            if last_unit == 10**8:
                total, section = (total + section + digit) * last_unit, 0
            elif last_unit == 10**4:
                total, section = total + (section + digit) * last_unit, 0
            else:
                section += (digit or 1) * last_unit
            digit = 0
        else:
            digit = DIGITS[character]
            last_unit = last_unit if digit else 10
    return total + section + digit * last_unit // 10


# --- texts, options, form --------------------------------------------------------------------------------------------


def core(text: str) -> str:
    """Return an answer without what does not count: case, white space, full-width forms, final punctuation."""
    return " ".join(_plain(text).casefold().split()).rstrip(".。!?;, ")


def exact_matches(answer: str, gold: str) -> bool:
    return core(answer) == core(gold)


def choice(answer: str, letters: str = "ABCD") -> str | None:
    """Return the option that an answer names: "B", "(B) …", "the answer is B", "答案：B"; None if none, or several."""
    text = _plain(answer)
    named = rf"(?!A (?!(?:is|or|and)\b)[a-z])([{letters}])(?![A-Za-z'])"  # "A dog" names no option
    letter = rf"[(\[*\"“【]*{named}"
    stated = rf"(?:答案|选择?项?|(?i:answer|option|choice))(?:应该|应当|应)?\s*(?:(?i:is)|是|为|选择?)?\s*:?\s*{letter}"
    if found := re.findall(stated, text):
        return found[-1]
    if opening := re.match(rf"{letter}(?!、[{letters}])(?:\s*$|[.,:;)\]、。】*\"”\n])", text):
        return opening[1]
    alone = set(re.findall(rf"(?<![A-Za-z']){named}", text))
    return alone.pop() if len(alone) == 1 else None


def choice_matches(answer: str, gold: str) -> bool:
    """Tell whether an answer names the gold letter. Raises ValueError if gold is not one letter from A to Z."""
    gold = gold.strip().upper()
    if not re.fullmatch("[A-Z]", gold):
        raise ValueError(f"the gold answer {gold!r} is not the letter of an option")
    return choice(answer, offered(gold)) == gold


def offered(gold: str) -> str:
    """Return the letters that options may have, as far as the gold letter tells."""
    return "".join(sorted({*"ABCD", gold.strip().upper()}))


def reasoned_parts(text: str) -> tuple[str, str] | None:
    """Return (thought, answer) of <think>…</think><answer>…</answer>; None if a tag is missing or misplaced."""
    match = REASONED.fullmatch(text)
    if match is None or any(TAG.search(part) for part in match.groups()):
        return None
    return match[1], match[2]


def is_well_formed(text: str) -> bool:
    """Tell whether both parts of a reasoned answer are there and neither is empty."""
    parts = reasoned_parts(text)
    return parts is not None and all(part.strip() for part in parts)
