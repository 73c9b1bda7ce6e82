"""Answers compared as mathematics, and as texts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dar.errors import DataError
from dar.verifiable.maths import final_answer, gold_text, is_correct, last_tagged

# Gold answer, completions that are correct, completions that are not. That every gold answer equals itself is a test of
# its own: a row may have neither.
CASES: list[tuple[str, list[str], list[str]]] = [
    # the same in other writing
    ("-3", ["−3", "–3", "The answer is −3.", "− 3", "x = −3", "\\boxed{−3}", "－3", "﹣3"], ["minus 3"]),
    ("−3", ["-3", "-3.0", "$-3$", "#### -3"], ["3"]),
    ("3", ["x=3", "٣", "3 years old", "The answer is 3.", "|−3|"], ["-3", "2 2/3", "\\dfrac{3}{4}", "3, 5", "3x"]),
    ("3", [], ["3 x", "3t", "3 dozen", "It cost three dollars", "", "\\boxed{}"]),
    ("2 1/2", ["2.5", "\\boxed{2\\frac12}"], []),
    ("2.5", ["2 1/2", "2\\frac{1}{2}", "2 and 1/2", "2 1/2 hours", "$2.50", "The answer is 2 1/2."], ["2,50"]),
    ("5/2", ["2½"], []),
    ("0.5", ["½", "\\frac{1}{2} cup", ".5", "So \\boxed{\\frac{1}{2}}"], []),
    ("-2.5", ["-2 1/2"], []),
    ("-1.5", [], ["-2 1/2"]),
    ("2", ["\\sqrt[3]{8}"], ["2 2/3", "She needs 2 2/3 cups.", "$2 \\frac{2}{3}$", "(1, 2)", "2 pi", "2:30"]),
    ("2", [], ["It starts at 2:30", "1:2", "3/2 1/2", "20%", "2i", "4:2", "²"]),
    ("2 2/3", [], ["2"]),
    ("8/3", ["2 2/3", "She needs 2 2/3 cups."], []),
    ("73", ["*73*", "**73**", "`73`", "_73_", "__73__", "The answer is *73*.", "So it is `73`."], []),
    ("73", ["So it is **73**.", "***73***", "~~73~~"], []),
    ("**73**", ["73"], []),
    ("18", ["+18", "It is +18", "18\\text{ cm}", "18 cm", "18cm", "18 square meters", "18 apples"], []),
    ("18", ["18 dollars per hour", "€18", "18 €", "£18.00", "\\$18", "USD 18", "US$18", "18.", "１８", "18 = 18"], []),
    ("18", ["9 + 9 = 18", "<think>It is 17</think> <answer>\n18\n</answer>"], []),
    ("18", ["The total is 5 apples, so she has 18", "The answer is 18 because 20 - 2 = 18, and not 17"], []),
    ("18", ["\\fbox{18}", "\\[18\\]", "\\(18\\)", "Total: 18 eggs\n\nHope that helps!", "= 18", "Answer: $18$."], []),
    ("18", ["The answer is 18!", "18 (eighteen)", "(18)", '"18"', "<b>18</b>", "18\\,\\text{cm}"], []),
    ("18", ["18\\mathrm{~cm}", "18 USD", "**Answer:** 18", "**The answer is 18**", "Final answer: 18"], []),
    ("18", ["# Answer\n18", "#### 18 eggs", "####18", "#### $18", "#### **18**", "The answer is 18\n\n#### 18\n"], []),
    ("18", ["<answer> $18$ </answer>", "<answer>\\boxed{18}</answer>", "<answer>x = 18</answer>"], []),
    ("18", ["<answer>The answer is 18 eggs.</answer>", "<answer>17</answer><answer>18</answer>"], []),
    ("18", ["<answer>18</answer> or 17", "• 18", "The answer is: 18.", "Thus, the final answer is $\\boxed{18}$."], []),
    ("18", ["answer = 18", "ANSWER: 18", "The answer is $18$ dollars."], ["17 or 18", "<answer>17 or 18</answer>"]),
    ("18", [], ["<think>It is 18</think><answer>17</answer>", "<answer></answer>", "- 18", "The answer is 18 or 19"]),
    ("+18", ["18"], []),
    ("-18", ["-$18"], ["+18"]),
    ("1000", ["\\boxed{1\\,000}", "1,000", "1 000", "1\u202f000", "1\xa0000", "1'000", "1_000", "1{,}000"], []),
    ("1000", ["1,\\!000", "1\\;000", "1\\ 000", "10^3", "1,000 dollars", "#### 1 000"], []),
    ("1,000", ["1000", "\\$1{,}000"], []),
    ("1000000", ["1,000,000", "1.000.000"], ["10,00,000"]),
    ("12345", ["It costs 12,345 dollars.", "12 345"], []),
    ("1", ["100%"], ["1,000", "(1, 2)", "1.0000001"]),
    ("1000.5", ["1,000.50"], []),
    ("1,000,000", ["1 000 000"], []),
    ("100", [], ["1000", "1,00"]),
    ("1500", ["1.5 \\times 10^3", "1.5e3", "1.5E+3", "1.5 × 10³", "1.5 x 10^3", "1.5*10^3", "1.5*10**3"], []),
    ("1500", ["1.5 \\cdot 10^{3}"], []),
    ("1.5 \\times 10^3", ["1500"], []),
    ("1.5e-8", ["1.5 × 10⁻⁸"], ["2.5e-8", "0.000000025"]),
    ("1.5 \\times 10^{-8}", ["1.5e-8"], []),
    ("1.5", ["1 1/2"], ["1.5e3", "1,5"]),
    ("1.5e3", [], ["1.5"]),
    ("300000000", ["3e8"], []),
    ("3e8", ["The speed is 3 x 10^8 m/s."], []),
    ("3/4", ["\\dfrac{3}{4}", "\\frac34", "75%", "We get $x = \\frac{3}{4}$.", "３／４"], ["12 3/4", "3:4"]),
    ("\\dfrac{3}{4}", ["3/4"], []),
    ("0.75", ["\\dfrac{3}{4}", "\\tfrac{3}{4}", "3⁄4", "The answer is $\\frac{3}{4}$ because of that."], []),
    ("4", ["4 people"], ["\\dfrac{3}{4}"]),
    ("-\\frac{3}{4}", ["-3/4"], []),
    ("-0.75", ["\\frac{-3}{4}"], []),
    ("(1, 2)", ["(1,2)", "The answer is (1, 2).", "$(1,2)$"], ["(2, 1)"]),
    ("(1,2)", ["\\left(1, 2\\right)"], []),
    ("(1, 2, 4)", [], ["(1, 2, 3)"]),
    ("(3, 2, 1)", [], ["(1, 2, 3)"]),
    ("[1, 2]", [], ["(1, 2)"]),
    ("(0, 1000)", ["(0, 1,000)"], []),
    ("100200", ["100 200"], ["(100,200)"]),
    ("\\{2, 1\\}", ["\\{1, 2\\}"], []),
    ("\\{1, 2\\}", ["{1, 2}"], []),
    ("2, 1", ["1, 2"], []),
    ("1, 3", [], ["1, 2"]),
    ("1, 2", ["1 and 2", "1,2"], []),
    ("1,2", [], ["12"]),
    ("12", ["3 \\times 4", "3*4", "12 inches"], ["1,2", "12 3/4", "1 2"]),
    ("3, 5", ["3 or 5"], ["3"]),
    ("(-\\infty,3]", ["(-∞, 3]"], []),
    ("(-∞, 1) ∪ (2, ∞)", ["(-\\infty, 1) \\cup (2, \\infty)"], []),
    ("6", ["\\boxed{6 dollars}", "6 dollars", "3!"], ["6 million"]),
    ("6 dollars", ["6"], []),
    ("18 dollars", ["$18"], []),
    ("5", ["5 \\text{ cm}^2", "$x = 5$", "5.0", "5 °C", "5°C", "5 ft", "5 percent of", "५"], []),
    ("60", ["60 km/h"], []),
    ("6000000", ["6 million"], []),
    ("45", ["45°", "45^\\circ"], []),
    ("45 degrees", ["45^{\\circ}"], []),
    ("17", ["I think it is 17 because 18 is too large.\n17"], ["18 dollars"]),
    ("2\\pi", ["2 pi", "2π"], []),
    ("\\$18", ["$18"], []),
    ("1234", ["₹1,234", "The answer is \\$1,234."], ["1.234"]),
    ("1234.5", ["$1,234.50", "The answer is 1,234.5."], []),
    ("25", ["25%", "25\\%", "25 percent"], ["26%"]),
    ("25%", ["25", "25 percent", "0.25"], ["2500%"]),
    ("0.25", ["25%"], []),
    ("0.25%", [], ["25%"]),
    ("12.5", ["12.5%", "It grew by 12.5%"], []),
    ("12.5%", ["12.5"], []),
    ("1/2", ["50%", "1-1/2", "2/4"], []),
    # texts
    ("B", ["(B)", "B.", "b", "\\text{B}", "\\boxed{\\textbf{(B)}}", "**B**", "The answer is B."], []),
    ("B", ["The answer is (B).", "Answer: B", "<answer>B</answer>", "B)", "The answer is **B**."], []),
    ("B", ["The correct answer is: B", "The answer is $\\boxed{B}$."], ["A", "The answer is A."]),
    ("(B)", ["B"], []),
    ("yes", ["Yes."], ["no", "not yes"]),
    ("no", ["No.", "I think the answer is no.", "NO"], ["on"]),
    ("Yes", ["The answer is yes."], []),
    ("true", ["True"], []),
    ("True", [], ["False"]),
    ("Paris", [], ["Parsi"]),
    ("2:30", ["The answer is 2:30."], ["2", "3:30"]),
    ("30", [], ["2:30"]),
    ("2:30 pm", ["2:30 PM"], []),
    ("World War 2", [], ["2"]),
    ("3 apples and 2 pears", [], ["2"]),
    ("January 5", [], ["5"]),
    ("None of these", ["none of these"], []),
    # algebra
    ("x=3", ["3", "x = 3"], []),
    ("x=4", [], ["x=3"]),
    ("y=3", [], ["x=3"]),
    ("2\\sqrt{2}", ["\\sqrt{8}", "√8", "2sqrt(2)"], []),
    ("\\sqrt{8}", ["sqrt(8)"], []),
    ("(x+1)^2", ["x^2+2x+1"], []),
    ("x²", ["x^2"], []),
    ("x^3", [], ["x^2"]),
    ("x^2", ["x**2"], []),
    ("π/4", ["\\frac{\\pi}{4}"], []),
    ("3+2x", ["2x+3"], []),
    ("x", [], ["3x"]),
    ("x ≤ 3", ["x \\le 3"], []),
    ("x > 3", [], ["x < 3"]),
    ("1/3", ["0.333333", "⅓"], ["0.3333"]),
    ("0.0000001", [], ["0"]),
    ("2/6", ["1/3"], []),
    ("7", ["007", "10 - 3"], []),
    ("9", [], ["9 + 9 = 18"]),
    ("8", ["2^3"], []),
    ("120", ["5!"], []),
    ("\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}", [], ["\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"]),
    ("2i+1", ["1+2i"], []),
    # where the answer stands
    ("He sells <<16-3-4=9>>9 eggs.\n#### 18", ["16 − 3 − 4 = 9, and 9 · 2 = 18. The answer is 18."], []),
    ("#### 18", ["17 first.\n#### 18\nThat is all, 3 steps."], ["The answer is 17.", "18 first.\n#### 17"]),
    ("#### 70,000", ["He made a profit of $70,000."], []),
    ("1234567", ["It has 1,234,567 people"], []),
    ("3, 4", ["\\boxed{3} and \\boxed{4}"], []),
    ("He says so: $\\boxed{\\dfrac{3}{4}}$", ["The solution is long. \\boxed{\\dfrac{3}{4}}"], []),
    ("19", [], ["the final answer is 18 dollars and 5 cents"]),
    ("20", ["The cost is $18 and the tip is $20", "20 percent"], ["0.2"]),
    ("10, 20", ["n = 10 or n = 20"], []),
    # the same, further
    ("0.0000002", [], ["0.0000001"]),
    ("-2", ["3 − 5"], []),
    ("1 1/2", [], ["11/2"]),
    ("11/2", ["5.5", "$5\\frac{1}{2}$"], []),
    ("-11/2", ["$-5\\frac{1}{2}$"], []),
    ("\\frac{3x}{2}", ["3\\frac{x}{2}"], []),
    ("1234.567", ["1,234.567"], []),
    ("1/10", ["0.1"], []),
    ("0.001", ["1e-3", "10^{-3}", "10⁻³"], []),
    ("5000", ["5 × 10^3 m"], []),
    ("1.5 × 10^4", [], ["1.5 × 10^3"]),
    ("6.02e23", ["6.02*10^23"], []),
    ("120000", ["1.2e5 people"], []),
    ("1024", ["2^10"], []),
    ("1000.0", ["1e3"], []),
    ("1e3", ["1E3"], []),
    ("C", ["(C) 4", "The answer is (C) 4", "Answer: C. because"], ["D", "C: 4"]),
    ("(C)", ["c"], []),
    ("BA", [], ["AB"]),
    ("Yes, they are", [], ["yes"]),
    ("(3, 4)", ["(3,4)"], []),
    ("(-1,2)", ["(−1, 2)"], []),
    ("[0, 1]", ["[0,1]"], []),
    ("[0,1)", [], ["(0,1]"]),
    ("{3,2,1}", ["{1,2,3}"], []),
    ("{1,2,3}", [], ["{1,2}"]),
    ("(1, 0.5)", ["(1, \\frac{1}{2})"], []),
    ("1,2,3", ["1, 2, 3"], []),
    ("(1,2),(3,4)", ["(1,2), (3,4)"], []),
    ("10 m", ["10 cm"], []),
    ("100 mm", [], ["10 cm"]),
    ("10", ["10 m/s^2"], []),
    ("9.8", ["9.8 m/s²"], []),
    ("72", ["72 cents"], []),
    ("18.5", ["18.5kg", "$18.50 per hour"], []),
    ("$18", ["\\$18.00"], []),
    ("1000 dollars", ["$1,000"], []),
    ("20 %", ["20%"], []),
    ("5 percent", ["5%"], []),
    ("3.14", ["The answer is 3.14"], []),
    ("\\sin(x)", ["\\sin x"], []),
    ("\\ln 2", ["ln(2)"], []),
    ("y", [], ["x"]),
    ("b+a", ["a+b"], []),
    ("2ba", ["2ab"], []),
    ("x^2-1", ["(x+1)(x-1)"], []),
    ("x-1", [], ["x+1"]),
    ("2x", ["f(x)=2x"], []),
    ("2x+1", ["y=2x+1"], []),
    ("y=2x+1", ["2x+1=y"], []),
    ("3<x", ["x>3"], []),
    ("x \\geq 3", ["x ≥ 3"], []),
    ("√3/2", ["\\frac{\\sqrt{3}}{2}"], []),
    ("∞", ["\\infty"], []),
    ("-\\infty", ["-∞"], []),
    ("-∞", [], ["∞"]),
    ("π", ["\\pi", "pi"], ["3.14159"]),
    ("90°", ["90^\\circ"], []),
    ("90", ["\\angle ABC = 90^\\circ"], []),
    ("0.333", [], ["1/3"]),
    ("0.10", ["0.1"], []),
    ("99999999999999999998", [], ["99999999999999999999"]),
    ("123456789012345678901234567890.6", [], ["123456789012345678901234567890.5"]),
    ("1000000001", [], ["1000000000"]),
    ("1000000.5", [], ["1000000.4"]),
    ("0", ["0/5"], []),
    ("12:00", [], ["12 hours"]),
    ("2,024", ["2024"], []),
    ("2024", ["in 2024"], []),
    ("123", [], ["1 2 3", "0,123"]),
    ("1.234", [], ["1,234"]),
    ("4/3", ["1⅓"], []),
    ("x^2+1", ["x²+1"], []),
    ("3.5", [], ["٣٫٥"]),
]
# Compared with nothing but themselves.
ALONE = [
    "(1, 2, 3)", "[1, 2)", "(-\\infty, 3]", "18 cm", "6 million", "3m", "1:2", "Monday", "1/2/2024",
    "5 hours 30 minutes", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "3-5", "option C", "AB", "\\{\\}", "\\emptyset",
    "1;2", "8 a.m.", "sin(x)", "e^2", "i", "0.33", "99999999999999999999", "5/0", "1:1", "12:30:15",
]  # fmt: skip


@pytest.mark.parametrize(("gold", "correct", "wrong"), CASES)
def test_answers(gold: str, correct: list[str], wrong: list[str]) -> None:
    assert [text for text in correct if not is_correct(text, gold)] == []
    assert [text for text in wrong if is_correct(text, gold)] == []


def test_every_gold_answer_equals_itself() -> None:
    assert [gold for gold in [*ALONE, *(gold for gold, _, _ in CASES)] if is_correct(gold, gold) is not True] == []


def test_final_answer_is_what_follows_the_last_marker_on_its_line() -> None:
    assert final_answer("9 eggs\n#### 18\n") == "18"
    assert final_answer("#### 1\n#### 2 \nrest") == "2"
    assert final_answer("#### 1\n####\n") == "1"
    assert final_answer(" 1/2 ") == "1/2"


def test_last_tagged_is_the_last_that_was_closed() -> None:
    assert last_tagged("<answer>1</answer> <answer>2</answer> <answer>3") == "2"
    assert last_tagged("</answer> 1 <answer>2") == "</answer> 1 <answer>2"


@pytest.mark.parametrize("gold", ["", "####", "  ", "nan", math.nan, math.inf, True, None, ["18"], {"answer": 18}])
def test_gold_without_an_answer_is_an_error(gold: Any) -> None:
    with pytest.raises(DataError, match="no answer can be read from the gold answer"):
        is_correct("18", gold)


def test_gold_may_be_a_number() -> None:
    assert (gold_text(18), gold_text(1e22)) == ("18", "1e+22")
    assert is_correct("18", 18.0)
