"""Which prompts count as one, and which do not."""

import pytest

from cwac_lab.data.folding import normalise

APART = [
    ("12 + 3", "12 - 3"), ("12 * 3", "12 / 3"), ("2 < 3", "2 > 3"), ("-5", "5"),
    ("3.5", "35"), ("3.5", "3 5"), ("1,5", "15"),
    ("What is 5!?", "What is 5?"), ("a != b", "a = b"), ("x-1", "x+1"),
    ("2*(3+4)", "2*3+4"), ("2 * (a + b)", "2 * a + b"),
    ("C++", "C#"), ("C++", "C"), ("F#", "F"), (".NET", "net"), ("50%", "50"),
    ("$5", "\u20ac5"), ("AT&T", "at t"), ("@home", "home"),
    ("x\u00b2", "x2"), ("x^2", "x 2"), ("\u0915\u093f", "\u0915\u0940"),
    ("\u0915\u093e", "\u0915"), ("\u0e01\u0e34", "\u0e01\u0e35"),
    ("\u0628\u064e", "\u0628\u064f"), ("\U0001f600", "\U0001f622"), ("\U0001fae8", "\U0001fae9"),
    ("?", "!"), ("Ma\u00dfe", "Masse"),
    ("\U0001f468\u200d\U0001f469", "\U0001f468\U0001f469"), ("r\u00e9sum\u00e9", "resume"), ("10:30", "1030"),
]  # fmt: skip
ALIKE = [
    ("How do I, well, do it?", "how do I well  do it"), ("Why?\n", "why"), ("\u201cYes\u201d", "'yes'"),
    ("don\u2019t", "don't"),
    ("step-by-step", "step by step"), ("COVID-19", "covid 19"), ("wait \u2014 what", "wait - what"),
    ("caf\u00e9", "cafe\u0301"),
    ("12+3", "12 + 3"), ("12 \u2212 3", "12 - 3"), ("C ++", "c++"),
    ("What is 12 + 3?", "what is 12 + 3"), ("`ls`", "ls"),
    ("end\u2026", "end."), ("a\u00adb\u200bc", "abc"), ("\ufeffhi", "hi"),
    ("\u00bfQu\u00e9?", "qu\u00e9"), ("well;so:then", "well, so then"),
    ("\u2764\ufe0f", "\u2764"), ("\u4f60\u597d\u3002", "\u4f60\u597d"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), APART)
def test_other_prompts_stay_apart(one, other):
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_forms_of_one_prompt_are_one(one, other):
    assert normalise(one) == normalise(other)
