"""Formulas as Unicode where that says the same, and as they were written where it would not."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.tui.text.markdown import Frame, document
from qchat.tui.text.markdown.lines import copied, plain
from qchat.tui.text.markdown.maths import as_unicode
from qchat.tui.text.sanitise import printable
from tests.paths import ROOT

# pieces of formulas, separated by two spaces
WORDS = r"""x  2  {  }  ^  _  &  \\  \frac  \alpha  \left(  \right.  \begin{pmatrix}  \end{pmatrix}  \sqrt  [
]  \text{if}  %  \x  $  '  é  \mathbb{R}  \sin"""
PIECES = st.sampled_from([" ", "\n", *WORDS.replace("\n", "  ").split("  ")])
UNKNOWN = [
    *(
        r"\unknown{x}",
        r"\underbrace{x}_{n}",
        "{",
        "}",
        "a}",
        "{a",
        r"\frac{a}",
        "x^",
        "a & b",
        r"\sqrt[",
        "100%",
    ),
    *(r"\begin{x} a \end{x}", r"\begin{matrix} a", r"\input{/etc/passwd}", r"a \over b", "", "  "),
    "{" * 3_000 + "}" * 3_000,
]


@pytest.mark.parametrize(
    ("formula", "shown"),
    [
        (r"x^2 + y_1 = \frac{a+b}{2}", "x² + y₁ = (a+b)/2"),
        (r"x^{n+1}", "xⁿ⁺¹"),
        (r"\frac{a}{b}c + \frac{a}{b}^2 - \frac a b", "(a/b)c + (a/b)² - a/b"),
        (r"{a+b}^2", "(a+b)²"),
        (r"e^{i\pi} + 1 = 0", "e^(iπ) + 1 = 0"),
        (r"\int_0^1 x\,dx \le \infty", "∫₀¹ x dx ≤ ∞"),
        (r"\sum_{i=1}^{n} i", "∑ᵢ₌₁ⁿ i"),
        (r"\sqrt{x^2+1} \ne \sqrt[3]{8}", "√(x²+1) ≠ ³√8"),
        (r"\mathbb{R}^n \subset \mathcal{O}", "ℝⁿ ⊂ 𝒪"),
        (r"\left\| x \right\|_2 = \sin x", "‖ x ‖₂ = sin x"),
        (r"\text{if } x > 0", "if x > 0"),
        (r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}", "(a b; c d)"),
        (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "a = b\nc = d"),
        (r"\begin{cases} 1 & x>0 \\ 0 & \text{else} \end{cases}", "{ 1 x>0; 0 else"),
        (r"f'(x) \cdot \vec{E}", "f′(x) · E⃗"),
        (r"\{1\} \cup 10\%", "{1} ∪ 10%"),
    ],
)
def test_a_formula_says_the_same_in_unicode(formula: str, shown: str):
    assert as_unicode(f"${formula}$") == shown
    assert as_unicode(f"\\[\n{formula}\n\\].") == f"{shown}."


@pytest.mark.parametrize("formula", UNKNOWN)
def test_what_is_not_known_stays_as_it_was_written(formula: str):
    assert as_unicode(f"${formula}$") == f"${formula}$"


@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_formula_becomes_printable_text_or_stays(formula: str):
    source = f"$${formula}$$"
    shown = as_unicode(source)
    assert shown == source or printable(shown) == shown
    assert shown.strip()


def test_a_selection_of_a_formula_is_its_source():
    (line,) = document(r"so $x^2$ and \(\alpha\), then", Frame(60, 60))
    assert plain(line) == "so x² and α, then"
    assert copied(line) == r"so $x^2$ and \(\alpha\), then"


def test_the_library_is_imported_only_where_there_is_a_formula():
    """The first paint and most answers do without."""
    code = (
        "import sys\nfrom qchat.tui.text.markdown import Frame, document\n"
        "document('text for $5 and `code`', Frame(60, 60))\nassert 'pylatexenc' not in sys.modules\n"
        r"document('so $\\alpha$', Frame(60, 60))" + "\nassert 'pylatexenc' in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / ".dev")}, timeout=60
    )
