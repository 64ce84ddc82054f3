"""Emphasis beside Chinese, Japanese and Korean, which put no spaces around words.

CommonMark looks for a space where emphasis ends in punctuation, so `**注意：**先` would keep its asterisks.
Here a CJK character counts as a border of words, and CJK punctuation as a letter, as in the specification of
markdown-cjk-friendly. Other text is read as CommonMark reads it.
"""

import re

from markdown_it import MarkdownIt
from markdown_it.common.utils import isMdAsciiPunct, isPunctChar, isWhiteSpace
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.state_inline import Scanned
from markdown_it.token import Token
from markdown_it.utils import EnvType

_CJK = re.compile(
    "[\u1100-\u11ff\u2e80-\ua4cf\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe6f\uff00-\uffef"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)


class InlineParser(ParserInline):
    """The library's parser with `_State` in place of its own."""

    def parse(self, src: str, md: MarkdownIt, env: EnvType, tokens: list[Token]) -> list[Token]:
        state = _State(src, md, env, tokens)
        self.tokenize(state)
        for rule in self.ruler2.getRules(""):
            rule(state)
        return state.tokens


class _State(StateInline):
    def scanDelims(self, start: int, canSplitWord: bool) -> Scanned:
        """Return whether the run of markers at `start` can open and close emphasis, and its length."""
        end, marker = start, self.src[start]
        while end < self.posMax and self.src[end] == marker:
            end += 1
        before, after = self._character(start - 1), self._character(end)
        cjk = [bool(_CJK.match(character)) for character in (before, after)]
        space = [isWhiteSpace(ord(character)) for character in (before, after)]
        punctuation = [
            isMdAsciiPunct(ord(character)) or isPunctChar(character) for character in (before, after)
        ]
        foreign = [mark and not own for mark, own in zip(punctuation, cjk, strict=True)]
        opens = not space[1] and (not foreign[1] or space[0] or foreign[0] or cjk[0])
        closes = not space[0] and (not foreign[0] or space[1] or foreign[1] or cjk[1])
        return Scanned(
            opens and (canSplitWord or not closes or punctuation[0]),
            closes and (canSplitWord or not opens or punctuation[1]),
            end - start,
        )

    def _character(self, place: int) -> str:
        """Return the character at `place`; the ends of the text count as spaces."""
        return self.src[place] if 0 <= place < self.posMax else " "
