"""Markdown in lines: growing and whole alike, within the width, code as it was written."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qchat.tui.text.markdown import Frame, Line, Splitter, Stream, code_blocks, document, render
from qchat.tui.text.markdown.emphasis import InlineParser
from qchat.tui.text.markdown.highlight import CHUNK
from qchat.tui.text.markdown.lines import copied, plain, width_of
from qchat.tui.text.markdown.parser import WIDTH_ROWS
from qchat.tui.text.markdown.splitter import MAX_LINE
from qchat.tui.text.sanitise import printable

# --- texts as models write them, and worse ---

WORDS = (
    "a", "word", "**bold**", "*em*", "`code`", "~~gone~~", "[text](https://x.yz/a_b)", "<https://x.yz>",
    "$x_1*y$", "\\(a_b\\)", "中文字符", "👩‍👩‍👧", "❤️", "e\u0301", "עברית", "**", "`", "|", "-", "1.", "#",
    "<br>", "&amp;", "\\", "[x]", "$$", "\\[", "![alt](pic.png)", "verylongwordthatdoesnotfitanywhereatall",
)  # fmt: skip
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)


def indented(text: str, by: int) -> str:
    return "\n".join(" " * by + line for line in text.split("\n"))


def item(parts: list[str], marker: str) -> str:
    first, *rest = indented("\n".join(parts), len(marker)).split("\n")
    return "\n".join([marker + first[len(marker) :], *rest])


def fenced(language: str, lines: list[str], mark: str, closed: bool) -> str:
    return "\n".join([mark + language, *lines, *([mark] if closed else [])])


def table(rows: Sequence[Sequence[str]]) -> str:
    size = len(rows[0])
    lines = ["| " + " | ".join([*row, *[""] * size][:size]) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * size, *lines[1:]])


leaves = st.one_of(
    words,
    st.lists(words, min_size=1, max_size=4).map("\n".join),
    st.tuples(st.integers(1, 6), words).map(lambda part: "#" * part[0] + " " + part[1]),
    words.map(lambda text: text + "\n==="),
    st.sampled_from(["---", "***", "$$\na_b\n$$", "\\[ x \\]", "    indented\n\n    code", "\\[\nx"]),
    st.builds(
        fenced,
        st.sampled_from(["", "python", "no-such", "json title=x"]),
        st.lists(
            st.sampled_from(["def f(x):", '    """doc', "", "\treturn x", "# `` x", "中" * 30]), max_size=60
        ),
        st.sampled_from(["```", "~~~", "````", "  ```"]),
        st.booleans(),
    ),
    st.lists(st.lists(words, min_size=1, max_size=4), min_size=1, max_size=6).map(table),
    st.builds(
        lambda rows, times: table([*rows[:1], *(rows * times)]),
        st.lists(st.lists(words, min_size=2, max_size=3), min_size=1, max_size=4),
        st.integers(1, 20),
    ),
)


def listed(items: list[list[str]], marker: str, gap: str) -> str:
    return ("\n" + gap).join(item(parts, marker) for parts in items)


def quoted(text: str) -> str:
    return "\n".join("> " + line for line in text.split("\n"))


def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    items = st.lists(st.lists(inner, min_size=1, max_size=3), min_size=1, max_size=4)
    marks = st.sampled_from(["- ", "* ", "1. ", "7) ", "- [ ] "])
    return st.one_of(st.builds(listed, items, marks, st.sampled_from(["", "\n"])), inner.map(quoted))


blocks = st.recursive(leaves, containers, max_leaves=6)
separators = st.sampled_from(["\n\n", "\n", "\n\n\n", "\n \n"])
texts = st.lists(st.tuples(blocks, separators), max_size=6).map(
    lambda parts: "".join(a + b for a, b in parts)
)
wild = st.text(st.sampled_from(" \n\t#>-*+_`~|$\\[]()!:1.ab<&中❤\ufe0f") | st.characters(), max_size=80)
sources = st.one_of(texts, wild, st.builds(str.__add__, wild, texts), st.builds(str.__add__, texts, wild))
sources = sources.map(printable)
frames = st.builds(lambda width, more: Frame(width, width + more), st.integers(8, 90), st.integers(0, 40))


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(at % (len(text) + 1) for at in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


def shown(lines: list[Line]) -> str:
    return "\n".join(plain(line) for line in lines)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sources, st.lists(st.integers(0, 10_000), max_size=30), frames)
@example("- a\n- b\n\n- c\n  - d\n1. x\n1. y", list(range(40)), Frame(30, 30))
@example("text\n#tag\n\n```python\n" + "x = '''\n" * 60 + "```\nend", list(range(0, 600, 7)), Frame(30, 40))
def test_a_text_that_grew_shows_what_it_shows_at_once(source: str, cuts: list[int], frame: Frame):
    stream, so_far = Stream(frame), ""
    for piece in pieces(source, cuts):
        stream.feed(piece)
        so_far += piece
        assert shown(stream.lines) == shown(document(so_far, frame))
    stream.finish()
    assert stream.lines == document(source, frame)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.one_of(leaves, wild.map(printable)), st.integers(24, 90), st.integers(0, 40))
def test_no_line_is_wider_than_there_is_room(source: str, width: int, more: int):
    frame = Frame(width, width + more)
    assert all(width_of(line.spans) <= frame.wide for line in document(printable(source), frame))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(sources, st.lists(st.integers(0, 10_000), max_size=8))
def test_finished_pieces_are_never_taken_back_and_make_up_the_text(source: str, cuts: list[int]):
    splitter, frame = Splitter(), Frame(40, 40)
    found = [piece for part in pieces(source, cuts) for piece in splitter.feed(part)] + splitter.finish()
    assert shown([line for piece in found for line in render(piece, frame)]) == shown(document(source, frame))


# --- what is shown ---


def rows(source: str, width: int = 40, wide: int = 0) -> list[str]:
    return [plain(line).rstrip() for line in document(source, Frame(width, wide or width))]


def selected(source: str, width: int = 40) -> str:
    lines = document(source, Frame(width, width))
    return "".join((line.joint if number else "") + copied(line) for number, line in enumerate(lines))


def styles(source: str) -> dict[str, str]:
    return {span.text: span.style for line in document(source, Frame(60, 60)) for span in line.spans}


def test_headings_stand_over_their_text_and_blocks_apart():
    assert rows("# One\n\ntext\n## Two\nmore\n- a\n\nend") == [
        "One", "text", "", "Two", "more", "• a", "", "end",
    ]  # fmt: skip


def test_lists_keep_numbers_nesting_and_the_empty_lines_of_the_source():
    source = "3. three\n3. four\n   - inner\n     lazy\n\n   para\n\n9. five"
    assert rows(source) == ["3. three", "4. four", "   ◦ inner", "     lazy", "", "   para", "", "5. five"]


def test_tasks_are_boxes_that_copy_as_they_were_written():
    assert rows("- [ ] open\n- [x] done") == ["☐ open", "☑ done"]
    assert selected("- [ ] open\n- [x] done") == "- [ ] open\n- [x] done"


@pytest.mark.parametrize(
    "formula",
    [
        "$a_1*b*c_2$",
        "\\(x_i * y_i\\)",
        "\\[ a_{1} \\]",
        "$$x*y*z$$",
        "$$\na_b\n\\frac{a*b}{c*d}\n$$",
        "\\[\nx_1*y*z\n\\]",
    ],
)
def test_mathematics_is_copied_as_it_is_written(formula: str):
    source = f"so {formula}" if "\n" not in formula else formula
    assert selected(source) == source
    assert "*" in "".join(rows(source)) or "*" not in formula, "no emphasis took its signs"


STRESSED = [
    ("**请注意：**先备份数据。", "请注意："),
    ("这是**「重点」**内容", "「重点」"),
    ("**結論です。**次に進みます。", "結論です。"),
    ("共有**（三个）**步骤", "（三个）"),
    ("这是**“重点”**内容", "“重点”"),
    ("**请注意:**先备份", "请注意:"),
    ("见**C++。**然后", "C++。"),
    ("**한국어(Korean)**를", "한국어(Korean)"),
    ("然后**100%**完成", "100%"),
    ("~~删除。~~保留", "删除。"),
    ("*（斜）*体", "（斜）"),
    ("**𠮷（。）**野", "𠮷（。）"),
    ("a**“b”**c", None),
    ("2 * 3 * 4", None),
    ("a ** b", None),
    ("snake_case_名前_x", None),
    ("`**x。**y`", None),
]


@pytest.mark.parametrize(("source", "stressed"), STRESSED)
def test_emphasis_beside_cjk_needs_no_spaces_and_elsewhere_is_commonmarks(source: str, stressed: str | None):
    (line,) = document(source, Frame(60, 60))
    spans = [span.text for span in line.spans if span.style in ("strong", "em", "struck")]
    assert "".join(spans) == (stressed or "")
    assert plain(line) == (source if stressed is None and "`" not in source else plain(line))
    assert not stressed or not set("*~") & set(plain(line))


@given(st.text("ab ,.*_~“(\n", max_size=30))
def test_other_text_is_read_as_commonmark_reads_it(text: str):
    theirs = MarkdownIt("commonmark").enable("strikethrough")
    ours = MarkdownIt("commonmark").enable("strikethrough")
    ours.inline = InlineParser()
    ours.inline.ruler.enableOnly(theirs.get_active_rules()["inline"])
    ours.inline.ruler2.enableOnly(theirs.get_active_rules()["inline2"])
    assert ours.render(text) == theirs.render(text)


def test_prices_are_no_mathematics():
    assert rows("from $5 to $10, *cheap*") == ["from $5 to $10, cheap"]
    assert styles("from $5 to *this* $10")["this"] == "em"
    assert rows("set $HOME/$USER and $PATH:$HOME") == ["set $HOME/$USER and $PATH:$HOME"]


def test_the_address_of_a_link_can_be_read_and_only_safe_ones_are_handed_on():
    assert rows("[here](https://x.yz/a) <https://q.r>") == ["here (https://x.yz/a) https://q.r"]
    spans = [
        span
        for line in document("[a](https://x.yz) [b](file:///etc) [c](ftp://x)", Frame(90, 90))
        for span in line.spans
    ]
    assert [span.action for span in spans if span.action] == ["link https://x.yz"]


def test_html_is_text():
    assert rows("<b>x</b>\n\n<div>\n*y*\n</div>") == ["<b>x</b>", "", "<div>", "y", "</div>"]


def test_a_fence_has_its_language_a_word_to_click_and_its_code_as_it_was():
    source = "```python\ndef f():\n\treturn 1\n\n```"
    lines = rows(source)
    assert lines[0].startswith("┌ python ─") and lines[0].endswith(" copy ─┐")
    assert lines[1:-1] == ["  def f():", "      return 1", ""]
    assert selected(source) == source
    assert code_blocks(f"- x\n\n  {source.replace(chr(10), chr(10) + '  ')}") == [
        ("python", "def f():\n\treturn 1\n\n")
    ]


def test_code_is_coloured_once_more_as_a_whole_when_its_fence_closes():
    text = '```python\nx = """\n' + "inside\n" * 2 * CHUNK
    stream = Stream(Frame(40, 40))
    stream.feed(text)
    assert "String" not in stream.lines[CHUNK + 10].spans[1].style
    stream.feed('"""\n```\n')
    assert "String" in stream.lines[CHUNK + 10].spans[1].style
    assert stream.lines == document(text + '"""\n```\n', Frame(40, 40))


def test_only_the_open_rest_is_laid_out_again():
    stream = Stream(Frame(40, 40))
    stream.feed("one\n\n- two\n- three\n\n```\n" + "code\n" * CHUNK)
    assert stream.fixed == len(stream.lines) == 1 + 1 + 2 + 1 + 1 + CHUNK
    assert stream.feed("more") == stream.fixed


def test_code_lines_use_the_whole_width_and_are_broken_only_there():
    source = "```\n" + "x" * 70 + "\n```"
    assert rows(source, 40, 60)[1:3] == ["  " + "x" * 58, "↩ " + "x" * 12]
    assert "x" * 70 in selected(source)


def test_tables_have_the_width_of_their_content_and_shrink_to_the_room():
    source = "| name | size |\n|:--|--:|\n| a | 1 |\n| long words here to be wrapped | 22 |"
    assert rows(source, 20, 60)[:3] == [
        "name                          │ size",
        "──────────────────────────────┼─────",
        "a                             │    1",
    ]
    narrow = rows(source, 24)
    assert max(map(len, narrow)) <= 24 and len(narrow) == 5
    assert selected(source, 60).split("\n")[:3] == ["name | size", "--- | ---", "a | 1"]


def test_a_table_with_too_many_columns_becomes_records():
    source = "| " + " | ".join("abcdefgh") + " |\n" + "|-" * 8 + "|\n" + "| long text " * 8 + "|"
    assert rows(source, 24)[:2] == ["a: long text", "b: long text"]


WIDE = "| name | description | another | measured |\n|---|---|---|---:|\n"
WIDE += "| Qwen3.6-27B | a large hybrid model | yes | 1234567 |"


def test_a_table_folds_into_records_before_its_words_would_be_cut():
    """Whole words can be read in a table of any width, or each row is a list of names and values."""
    for width in range(24, 90):
        shown = rows(WIDE, width)
        assert max(map(len, shown)) <= width
        assert all(any(word in row for row in shown) for word in ("Qwen3.6-27B", "description", "1234567"))
    assert rows(WIDE, 60)[0].count("│") == 3
    assert rows(WIDE, 30)[:2] == ["name: Qwen3.6-27B", "description: a large hybrid"]


def test_wide_characters_may_be_cut_anywhere_so_their_table_stays_one():
    source = "| 名前 | 説明 |\n|---|---|\n| 一二三四五六七八 | 甲乙丙丁戊己庚辛壬癸甲乙丙丁 |"
    assert rows(source, 24)[0].count("│") == 1


def test_rows_after_the_fortieth_never_change_the_columns_and_are_laid_out_once():
    stream, source = Stream(Frame(60, 60)), "| a | b |\n|---|---|\n"
    stream.feed(source)
    for number in range(60):
        stream.feed(f"| {number} | {'long ' * (number // 20 * 3)} |\n")
        assert len(stream.lines) - stream.fixed <= (43 if number <= WIDTH_ROWS else 3)
    widths = {plain(line).index("│") for line in stream.lines if "│" in plain(line)}
    assert widths == {3} and "long" in plain(stream.lines[-1])


def test_quotes_are_barred_and_copied_with_their_mark():
    assert rows("> a *b*\n> - c") == ["▎ a b", "▎ • c"]
    assert selected("> some words that are broken over two lines", 24).count("\n") == 0
    assert selected("> a\n> b") == "> a\n> b"


def test_lines_that_were_broken_to_fit_are_whole_when_copied():
    source = "- one two three four five six seven eight nine ten"
    assert len(rows(source, 20)) == 3
    assert selected(source, 20).replace("   ", " ") == source


def test_a_list_in_pieces_keeps_counting():
    stream = Stream(Frame(40, 40))
    for number in range(30):
        stream.feed(f"1. item {number}\n")
    assert [plain(line) for line in stream.lines][::29] == ["1. item 0", "30. item 29"]


# --- what would break a lesser one ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "x" * 100_000,
        "word " * 20_000,
        "漢" * 100_000,
        "👩‍👩‍👧" * 10_000,
        "e" + "\u0301" * 100_000,
        "```\n" + "x" * 100_000 + "\n```",
        "[" * 50_000,
        "*a **b " * 15_000,
        "`" * 50_000 + "a",
        "> " * 20_000 + "a",
        "- " * 20_000 + "a",
        "$" * 50_000,
        "\\(" * 30_000,
        "|a" * 20_000 + "|\n" + "|-" * 20_000 + "|",
        "a\n" * 20_000,
        "<http://a" * 10_000,
    ],
    ids=lambda source: source[:8].strip() or "blank",
)
def test_an_absurd_text_takes_seconds_at_most_and_stays_in_its_width(source: str):
    lines = document(printable(source), Frame(80, 80))
    assert lines and all(width_of(line.spans) <= 80 for line in lines)


def test_a_far_too_long_line_grows_as_it_is_shown_at_once():
    source = "word *more* " * 2_000
    stream = Stream(Frame(80, 80))
    for at in range(0, len(source), 997):
        stream.feed(source[at : at + 997])
    stream.finish()
    assert stream.lines == document(source, Frame(80, 80))
    assert len(source) > 4 * MAX_LINE and stream.fixed == len(stream.lines)
