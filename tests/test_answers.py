"""dataset/answers.py: what an answer says, however it is written."""

from fractions import Fraction

import pytest

from dataset.answers import (
    answer_part,
    choice,
    choice_matches,
    exact_matches,
    is_well_formed,
    number,
    number_matches,
    reasoned_parts,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", 42), ("It is 42.", 42), ("3 + 4 = 7", 7), ("1,234", 1234),
        ("$1,234.50 in all", Fraction("1234.5")),
        ("1, 2, 3", 3), ("1,2", 2), ("１２３", 123), ("１，２３４", 1234), (".5", Fraction(1, 2)), ("-5", -5),
        ("−5", -5),
        ("5-3", 3), ("5 - 3 = -2", -2), ("x=-2", -2), ("the answer is -$5", -5), ("答案是-5", -5), ("负5", -5),
        ("3/4", Fraction(3, 4)), ("-3 / 4", Fraction(-3, 4)), ("1 1/2 cups", Fraction(3, 2)),
        ("½", Fraction(1, 2)), ("1½", Fraction(3, 2)), ("2½ 杯", Fraction(5, 2)),
        (r"\frac{-1}{2}", Fraction(-1, 2)), (r"\frac{1.5}{2}", Fraction(3, 4)), (r"1\frac{1}{2}", Fraction(3, 2)),
        ("3千", 3000), ("2千3百", 2300), ("3万5千", 35000), ("-3万5000", -35000), ("3亿5千万元", 350_000_000),
        ("3百万", 3_000_000), ("2千克", 2), ("5百分点", 5), ("一点五万", 15000), ("两点三万亿", 23 * 10**11),
        (r"\frac{3}{4}", Fraction(3, 4)), (r"$\dfrac{3}{4}$", Fraction(3, 4)), ("1/0", None), ("6/0 or 7", 7),
        ("50%", Fraction(1, 2)), ("50 ％", Fraction(1, 2)), (r"12.5\%", Fraction(1, 8)),
        ("百分之50", Fraction(1, 2)),
        ("1e3", 1000), ("2.5e-1", Fraction(1, 4)), ("3.5万", 35000), ("2亿元", 2 * 10**8), ("共12个苹果", 12),
        ("答案是二十三，一定没错。", 23), ("所以还剩十二个。我们一起来检查一下。", 12), ("答：一样多", None),
        ("250千卡", 250), ("220千伏", 220), ("3千字", 3000),
        ("二十三", 23), ("十五个", 15), ("一百零五", 105), ("一百五", 150), ("两千", 2000),
        ("一万二", 12000), ("三万五千", 35000),
        ("三亿五千万", 350_000_000), ("一亿零五万", 100_050_000), ("一万亿", 10**12), ("二〇二四年", 2024), ("零", 0),
        ("三点一四", Fraction("3.14")), ("百分之五", Fraction(1, 20)), ("百分之十二点五", Fraction(1, 8)), ("负三", -3),
        ("三分之二", Fraction(2, 3)), ("负三分之二", Fraction(-2, 3)),
        ("零分之一", None), ("五千克", 5), ("五千米和六千", 6000),
        ("答案是三个", 3), ("统一答案是 5 个", 5), ("", None), ("no number", None), ("不知道", None),
        ("#### 18", 18), ("First 7.\n#### 1,800", 1800), (r"so \boxed{\frac{1}{2}} of 10", Fraction(1, 2)),
        ("<think>7 or 9</think><answer>8</answer>", 8), ("<think>7</think><answer>none</answer>", None),
        ("<think>7</think> 9", 9), ("<answer>8", 8), ("1" * 1000, None), ("9e99", 9 * 10**99),
        ("1e999999999", 999999999),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(text, expected):
    assert number(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("so 1,000 in all", "1000", True), ("0.5", "1/2", True), ("0.50", ".5", True), ("二十三", "23", True),
        ("50%", "0.5", True), ("50%", "50", True), ("50", "50%", True), ("0.5", "50%", True),
        ("50%", "50%", True),
        ("0.5%", "50%", False), ("50", "0.5", False), ("7", "8", False), ("none", "8", False),
        ("-7", "7", False),
        ("0.333", "1/3", False), ("72", "Half of 48 is 24.\n#### 72", True),
    ],
)  # fmt: skip
def test_numbers_match_however_they_are_written(answer, gold, same):
    assert number_matches(answer, gold) is same


def test_a_gold_answer_that_cannot_be_compared_with_is_an_error():
    with pytest.raises(ValueError, match="'blue' holds no number"):
        number_matches("5", "blue")
    for gold in ("", "AB", "5"):
        with pytest.raises(ValueError, match="not the letter of an option"):
            choice_matches("A", gold)


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        (" The  Thames. ", "the thames", True), ("<think>x</think><answer>北京</answer>", "北京。", True),
        ("ＡＢＣ", "abc", True), ("a b", "ab", False), ("", "a", False), ("It is Paris", "Paris", False),
    ],
)  # fmt: skip
def test_exact_matches(answer, gold, same):
    assert exact_matches(answer, gold) is same


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"), (" B ", "B"), ("B. because A is wrong", "B"), ("(C) it is", "C"), ("Ｄ", "D"),
        ("**B**", "B"),
        ("The answer is B.", "B"), ("A. x\nB. y\nSo the answer: (B)", "B"), ("答案是B", "B"),
        ("答案：C", "C"), ("我选D。", "D"),
        ("因此选择C，A、B都不对。", "C"), ("正确选项是C，不是A", "C"), ("我认为答案应当是C，A不对", "C"),
        ("A、B错误，C和D正确", None), ("A、北京", "A"), ("B、因为A是错的", "B"),
        ("正确选项为 A", "A"), ("答案是B？不，答案应选C", "C"),
        ("I think it is C", "C"), ("A or B", None), ("Because", None),
        ("A dog", None), ("A is right", "A"), ("the answer is a dog", None), ("D'accord", None),
        ("", None), ("E", None),
        ("<think>A?</think><answer>B</answer>", "B"), ("【B】", "B"), ("B、因为", "B"),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_names(answer, expected):
    assert choice(answer) == expected


def test_a_gold_letter_beyond_d_is_an_option_too():
    assert choice_matches("The answer is G", "g") and not choice_matches("The answer is A", "G")


def test_the_answer_is_the_last_mark():
    assert answer_part("<answer>1</answer> no, <answer>2</answer>") == "2"
    assert answer_part(r"\boxed{1} and \boxed{x^{2}}") == "x^{2}"
    assert answer_part("plain") == "plain"


def test_the_form_of_a_reasoned_answer():
    assert reasoned_parts("<think>\na\n</think>\n<answer>b</answer>") == ("\na\n", "b")
    assert is_well_formed("<think>a</think><answer>b</answer>")
    for wrong in (
        "<think> </think><answer>b</answer>",
        "<think>a</think>b",
        "<think>a<think>b</think><answer>c</answer>",
    ):
        assert not is_well_formed(wrong)
    assert reasoned_parts("<think> </think><answer>b</answer>") == (" ", "b")
