"""Pictures in the transcript: a line that tells what they are, and half blocks in their colours."""

from dataclasses import replace

from rich.color import Color
from textual.theme import Theme

from qchat.core.conversation.summary import ShownPicture
from qchat.core.vision.picture import Thumbnail
from qchat.tui.chat.turns import new_turn
from qchat.tui.text.markdown import Frame
from qchat.tui.widgets.transcript.blocks import Look, Question
from qchat.tui.widgets.transcript.palette import Palette
from qchat.tui.widgets.transcript.thumbnails import picture_lines

RED, BLUE, GREEN = "ff0000", "0000ff", "00ff00"
PALETTE = Palette(Theme("plain", "#ffffff"), {"foreground": "#ffffff", "background": "#000000"})
PICTURE = ShownPicture("a\x1b[2J cat.png", 640, 480, 1200, Thumbnail(2, 3, RED * 2 + BLUE * 2 + GREEN * 2))


def words(lines):
    return ["".join(span.text for span in line.spans) for line in lines]


def test_a_picture_is_told_and_drawn_two_pixels_in_a_cell():
    lines = picture_lines(PICTURE, 60)
    assert words(lines)[0].endswith("cat.png · 640 × 480 · 1.2k tokens")
    assert "\x1b" not in words(lines)[0]
    assert words(lines)[1:] == ["▀▀", "▀▀"]
    styles = [{span.style for span in line.spans} for line in lines[1:]]
    assert styles == [{f"rgb:{RED}:{BLUE}"}, {f"rgb:{GREEN}:{GREEN}"}]


def test_without_room_for_the_thumbnail_one_line_remains():
    assert len(picture_lines(replace(PICTURE, thumbnail=Thumbnail(32, 2, RED * 64)), 31)) == 1


def test_a_question_shows_its_pictures_below_its_words():
    turn = replace(new_turn(1, "what is it?"), pictures=(PICTURE,))
    question, look = Question(turn), Look(Frame(60, 60))
    lines = question.lines(look)
    assert words(lines)[0].startswith("what is it?")
    assert words(lines)[-1] == "▀▀"
    style = PALETTE.style(lines[-2].spans[0].style)
    assert (style.color, style.bgcolor) == (Color.parse(f"#{RED}"), Color.parse(f"#{BLUE}"))
    question.update(replace(turn, pictures=()))
    assert len(question.lines(look)) == 1
