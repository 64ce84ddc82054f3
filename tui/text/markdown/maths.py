"""LaTeX mathematics as Unicode text, where that says the same: symbols, scripts, fractions, roots, matrices.

The symbols are those of pylatexenc, whose own text loses braces (`x^{n+1}` becomes `x^n+1`). A formula with
anything that is not known here stays as it was written: better LaTeX than a wrong formula.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

MAX_CHARACTERS, MAX_DEPTH = 4_000, 30
_TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|\s+|.", re.DOTALL)
_DELIMITERS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_SPACES = dict.fromkeys((r"\,", r"\;", r"\:", r"\ ", "~", r"\quad", r"\qquad"), " ") | {r"\!": ""}
_ESCAPED = {rf"\{sign}": sign for sign in "{}%$&#_"} | {r"\|": "‖", r"\backslash": "\\"}
# sizes and styles, which plain text has not
_SILENT = {
    *(r"\left", r"\right", r"\middle", r"\displaystyle", r"\textstyle", r"\limits", r"\nolimits"),
    *(r"\big", r"\Big", r"\bigg", r"\Bigg", r"\bigl", r"\bigr", r"\Bigl", r"\Bigr", r"\biggl", r"\biggr"),
}
_PLAIN = {r"\mathrm", r"\mathbf", r"\mathit", r"\boldsymbol", r"\boxed", r"\mathop", r"\bm"}
_WORDS = {r"\text", r"\textbf", r"\textit", r"\textrm", r"\operatorname", r"\operatorname*", r"\mbox"}
_FRACTIONS = {r"\frac", r"\dfrac", r"\tfrac", r"\cfrac"}
_ALPHABETS = {r"\mathbb": "DOUBLE-STRUCK", r"\mathfrak": "FRAKTUR"}
_ALPHABETS |= dict.fromkeys((r"\mathcal", r"\mathscr"), "SCRIPT")
_ACCENTS = {
    r"\hat": "\u0302", r"\bar": "\u0304", r"\vec": "\u20d7", r"\dot": "\u0307", r"\ddot": "\u0308",
    r"\tilde": "\u0303", r"\overline": "\u0305", r"\underline": "\u0332", r"\widehat": "\u0302",
    r"\widetilde": "\u0303",
}  # fmt: skip
_MATRICES = {
    "matrix": ("[", "]"), "pmatrix": ("(", ")"), "bmatrix": ("[", "]"), "Bmatrix": ("{", "}"),
    "vmatrix": ("|", "|"), "Vmatrix": ("‖", "‖"), "smallmatrix": ("[", "]"),
}  # fmt: skip
_LINES = ("aligned", "align", "align*", "gathered", "gather", "gather*", "split", "equation", "equation*")
# what the library lacks
_MORE = {
    "ne": "≠", "implies": "⟹", "iff": "⟺", "land": "∧", "lor": "∨", "neg": "¬", "gets": "←", "Re": "ℜ",
    "Im": "ℑ", "degree": "°", "triangle": "△", "colon": ":", "bot": "⊥", "models": "⊨", "Box": "□",
}  # fmt: skip
_MORE |= {name: name for name in ("argmax", "argmin", "det", "dim", "ker", "gcd", "Pr", "cot", "sec", "csc")}
_ATOM = re.compile(r"[^\W_]+[\u0300-\u036f\u20d7]?|\(.*\)")
_NAME = re.compile(r"[a-z]{2,}\Z")
# the blocks in which the characters for scripts are
_SCRIPT_BLOCKS = ((0xB2, 0xBA), (0x2B0, 0x2B9), (0x1D2C, 0x1DC0), (0x2070, 0x209D), (0x2C7C, 0x2C7D))


class UnknownMaths(Exception):
    """A formula that cannot be said in plain text."""


@lru_cache(512)
def as_unicode(source: str) -> str:
    """Return a formula, with its delimiters, as text; as it was written where that cannot be done."""
    text = source.strip()
    begin, end = next((pair for pair in _DELIMITERS if text.startswith(pair[0])), ("", ""))
    tail = text[len(text.rstrip(" .,;")) :]
    inner = text[len(begin) : len(text) - len(tail)].removesuffix(end)
    if not begin or len(inner) > MAX_CHARACTERS or len(text) - len(tail) < len(begin + inner + end):
        return source
    try:
        formula = _Formula(inner).whole()
    except UnknownMaths:
        return source
    lines = [" ".join(line.split()) for line in formula.split("\n")]
    return "\n".join(line for line in lines if line) + tail if any(lines) else source


class _Formula:
    """The tokens of a formula, read from left to right."""

    def __init__(self, source: str) -> None:
        self._tokens = _TOKEN.findall(source)
        self._at = self._depth = 0

    def whole(self) -> str:
        text = self._until(lambda _: False)
        if self._peek():
            raise UnknownMaths
        return text

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    def _until(self, ends: Callable[[str], bool]) -> str:
        """Read up to a token that `ends` names, or a brace that closes."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnknownMaths
        parts: list[str] = []
        last = 0  # the place of the last part that is no space
        ratio = group = False  # what it is
        while (token := self._peek()) and token != "}" and not ends(token):
            is_script = token in "^_"
            piece = self._script(self._take()) if is_script else self._item()
            follows = piece[:1].isalnum() or piece[:1] in ("(", "√") or is_script
            if parts and ((ratio and follows) or (group and is_script)):
                parts[last] = f"({parts[last]})"  # or the fraction would end later, the power begin later
            if parts and _NAME.search(parts[-1]) and piece[:1].isalnum():
                parts.append(" ")  # `\sin x`, where LaTeX has a space of its own
            parts.append(piece)
            if piece.strip():
                last = len(parts) - 1
                ratio = token in _FRACTIONS or token == r"\sqrt"
                group = token == "{" and not _ATOM.fullmatch(piece)
        self._depth -= 1
        return "".join(parts)

    def _item(self) -> str:
        """Read one token with what belongs to it."""
        token = self._take()
        if token == "{":
            return self._group_after()
        if token in _SPACES:
            return _SPACES[token]
        if token in _ESCAPED:
            return _ESCAPED[token]
        if token in _SILENT:
            if self._peek() == ".":  # the delimiter that is none
                self._take()
            return ""
        if token == "\\\\":
            return "\n"
        if token.startswith("\\"):
            return self._macro(token)
        if token in "&#%":
            raise UnknownMaths
        return "′" if token == "'" else " " if token.isspace() else token

    def _group_after(self) -> str:
        """Read the rest of a group whose brace was read."""
        text = self._until(lambda _: False)
        if self._take() != "}":
            raise UnknownMaths
        return text

    def _argument(self) -> str:
        """Read a group, or the one item that stands in its place."""
        while self._peek().isspace():
            self._take()
        if not self._peek() or self._peek() in "}^_&":
            raise UnknownMaths
        return self._item().strip()

    def _raw_argument(self) -> str:
        """Read a group as it is written."""
        if self._take() != "{":
            raise UnknownMaths
        parts = []
        while (token := self._take()) != "}":
            token = _ESCAPED.get(token, _SPACES.get(token, token))
            if token in "{$" or (len(token) > 1 and token.startswith("\\")):
                raise UnknownMaths
            parts.append(token)
        return "".join(parts)

    def _macro(self, name: str) -> str:
        if name in _FRACTIONS:
            return f"{_as_factor(self._argument())}/{_as_factor(self._argument())}"
        if name == r"\sqrt":
            root = self._root()
            return f"{root}√{_as_factor(self._argument())}"
        if name in (r"\binom", r"\dbinom", r"\tbinom"):
            return f"C({self._argument()}, {self._argument()})"
        if name in _WORDS:
            return self._raw_argument()
        if name in _PLAIN:
            return self._argument()
        if name in _ALPHABETS:
            return "".join(_letter(_ALPHABETS[name], one) for one in self._argument())
        if name in _ACCENTS:
            return "".join(one + _ACCENTS[name] for one in self._argument())
        if name == r"\begin":
            return self._environment(self._raw_argument())
        symbol = _symbol(name[1:])
        if symbol is None:
            raise UnknownMaths
        return symbol

    def _root(self) -> str:
        """Read the degree of a root in brackets, if there is one."""
        if self._peek() != "[":
            return ""
        self._take()
        degree = self._until(lambda token: token == "]")
        if self._take() != "]":
            raise UnknownMaths
        raised = _scripts("<super>", degree.strip())
        if raised is None:
            raise UnknownMaths
        return raised

    def _script(self, sign: str) -> str:
        """Read what is raised or lowered; in characters for it, else after its sign."""
        text = self._argument()
        if sign == "^" and text and not text.strip("′"):
            return text
        found = _scripts("<super>" if sign == "^" else "<sub>", text)
        if found is not None:
            return found
        return f"{sign}{text}" if len(text) == 1 else f"{sign}({text})"

    def _environment(self, name: str) -> str:
        rows = [" ".join(cell for cell in row if cell) for row in self._rows(name)]
        rows = [row for row in rows if row]
        if name in _LINES:
            return "\n".join(rows)
        if name == "cases":
            return "{ " + "; ".join(rows)
        if name not in _MATRICES:
            raise UnknownMaths
        opening, closing = _MATRICES[name]
        return f"{opening}{'; '.join(rows)}{closing}"

    def _rows(self, name: str) -> Iterator[list[str]]:
        """Yield the cells of each row up to the end of the environment."""
        row: list[str] = []
        while True:
            row.append(self._until(lambda token: token in ("&", "\\\\", r"\end")).strip())
            match self._take():
                case "&":
                    continue
                case "\\\\":
                    yield row
                    row = []
                case r"\end" if self._raw_argument() == name:
                    yield row
                    return
                case _:
                    raise UnknownMaths


def _as_factor(text: str) -> str:
    """Return `text` in parentheses, unless it is one thing."""
    whole = _ATOM.fullmatch(text) and not (text.startswith("(") and ")" in text[1:-1])
    return text if whole else f"({text})"


def _scripts(kind: str, text: str) -> str | None:
    """Return `text` in characters for scripts; None where one is missing."""
    known = _script_characters(kind)
    found = [known.get(one) for one in text if one != " "]
    return "".join(one for one in found if one) if found and all(found) else None


@cache
def _script_characters(kind: str) -> Mapping[str, str]:
    """Return the characters of Unicode that stand for others as `<super>` or `<sub>` scripts."""
    found: dict[str, str] = {}
    for code in (code for block in _SCRIPT_BLOCKS for code in range(*block)):
        how, *rest = unicodedata.decomposition(chr(code)).split() or [""]
        if how == kind and len(rest) == 1:
            found.setdefault(chr(int(rest[0], 16)), chr(code))
    if "\u2212" in found:
        found["-"] = found["\u2212"]
    return found


def _letter(alphabet: str, letter: str) -> str:
    """Return a letter in one of the mathematical alphabets."""
    case = "CAPITAL" if letter.isupper() else "SMALL"
    short = {"FRAKTUR": "BLACK-LETTER"}.get(alphabet, alphabet)
    for name in (f"MATHEMATICAL {alphabet} {case} {letter}", f"{short} {case} {letter}"):
        try:
            return unicodedata.lookup(name.upper())
        except KeyError:
            continue
    raise UnknownMaths


@cache
def _symbol(name: str) -> str | None:
    """Return the character of a macro without arguments, or the name of a function."""
    from pylatexenc.latex2text import get_default_latex_context_db  # only where there is a formula

    spec = _symbols(get_default_latex_context_db).get_macro_spec(name)
    text = _MORE.get(name) or getattr(spec, "simplify_repl", None)
    return text if isinstance(text, str) and text and "%" not in text and text.isprintable() else None


@cache
def _symbols(make: Callable[[], Any]) -> Any:
    return make()
