"""What tool calls begin with: `<tool_call>`, or a known function, as a tag or as JSON at the beginning."""

import re
from collections.abc import Iterable

from .json_calls import ARGUMENTS
from .xml_calls import BEGIN_CALL, BLANK, IS, OPEN

# characters of a tag, and of JSON up to its arguments, that may be incomplete
MAX_TAG, MAX_BEGINNING = 400, 1000


class Openers:
    """What calls begin with: `<tool_call>`, or a known function, as a tag or as JSON at the beginning."""

    def __init__(self, names: tuple[str, ...]):
        known = "|".join(map(re.escape, names)) or "(?!)"
        function = rf"<{BLANK}function{IS}{BLANK}[\"']?(?:{known})[\"']?{BLANK}"
        end = rf"(?:/?>|(?=\s{{0,20}}<{BLANK}param))"
        self._tags = re.compile(f"{BEGIN_CALL}|{function}{end}", re.IGNORECASE)
        keys = "|".join(ARGUMENTS)
        quoted = [rf"[\"']{word}[\"']\s*:\s*" for word in ("name", f"(?:{keys})")]
        self._json = re.compile(
            rf"\s*(?:```\w*\s*)?\{{\s*{quoted[0]}[\"'](?:{known})[\"']\s*,\s*{quoted[1]}\{{"
        )
        names = tuple(map(_canonical, names))
        self._functions = tuple(f"<function={name}" for name in names)
        self._possible_json = [f'{{"name":"{name}","{key}":{{' for name in names for key in ARGUMENTS]

    def find(self, text: str, *, at_start: bool) -> re.Match[str] | None:
        """The first opener in `text`; `at_start` means that no words came before it."""
        return (at_start and self._json.match(text)) or self._tags.search(text)

    def possible(self, text: str, *, at_start: bool) -> int:
        """The number of characters at the end of `text` that may begin an opener."""
        if at_start and self._may_be_json(text):
            return len(text)
        tails = [place for place in _last_two(text, "<") if len(text) - place <= MAX_TAG]
        return next((len(text) - place for place in tails if self._may_be_tag(text[place:])), 0)

    def _may_be_tag(self, tail: str) -> bool:
        text = _canonical(tail)
        if OPEN.startswith(text) or (self._functions and "<functionname=".startswith(text)):
            return True
        text = text.replace("<functionname=", "<function=").replace("<function:", "<function=")
        if any(f"{one}/>".startswith(text) or f"{one}>".startswith(text) for one in self._functions):
            return True
        text = re.sub(r"\s+(?=<|\Z)", "", text)  # a tag that lacks its end
        return any(text.startswith(one) and f"{one}<param".startswith(text) for one in self._functions)

    def _may_be_json(self, text: str) -> bool:
        if not self._possible_json or len(text) > MAX_BEGINNING or not text.strip():
            return False
        text = text.lstrip()
        if text.startswith("`"):
            fence = re.match(r"```\w*\s+", text)
            if not fence:
                return re.fullmatch(r"`{1,3}|```\w{0,20}", text) is not None
            text = text[fence.end() :]
        canonical = re.sub(r"\s", "", text).replace("'", '"').lower()
        return any(one.startswith(canonical) for one in self._possible_json)


def _canonical(text: str) -> str:
    """Return a tag or a name without blanks and quotes, in lower case."""
    return re.sub(r"[ \t\"']", "", text).lower()


def _last_two(text: str, character: str) -> Iterable[int]:
    """Yield the second to last place of a character, and the last one."""
    last = text.rfind(character)
    return sorted({place for place in (text.rfind(character, 0, max(last, 0)), last) if place >= 0})
