"""Conversations as files: JSON there and back, pages that cannot act, imports that are not trusted."""

import json
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.errors import StoreError, UsageError
from qchat.core.storage import export, importer, records
from qchat.core.storage.records import Conversation, ModelIdentity, Node
from qchat.core.storage.store import Store

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

NASTY = "</pre></details><script>alert(1)</script><img src=http://x.test/a onerror=alert(1)>&lt;\x00\x1b[31m"


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def capitals(books: Store) -> int:
    """Two branches, a tool loop, a stopped answer."""
    conversation = books.create(
        title="Capitals",
        system="Be brief.",
        settings={"temperature": 0.5, "stop": ["\n\n"]},
        model=ModelIdentity("Qwen3.6-27B", "/models/q", "a", "b", "c"),
    )
    question = books.add_node(conversation, None, "user", text="France?", ids=[1, 2, 248_319])
    books.add_node(
        conversation, question, "assistant", text="Par", thinking="One\n\n`two`", state="cancelled"
    )
    call = books.add_node(
        conversation, question, "assistant", tool_calls=[{"name": "look", "arguments": {"up": ["France"]}}]
    )
    result = books.add_node(conversation, call, "tool", text="```\nParis\n```")
    books.add_node(
        conversation, result, "assistant", text="**Paris**", thinking="Yes.", stats={"generated_tokens": 3}
    )
    return conversation


def exported(books: Store, conversation: int, path: Path) -> dict[str, Any]:
    export.export_conversation(books, conversation, path, overwrite=True)
    return json.loads(path.read_text())


def without_ids(nodes: list[Node]) -> list[Node]:
    """With ids and parents counted from the first message, and no conversation."""
    places: dict[int | None, int | None] = {node.id: place for place, node in enumerate(nodes)} | {None: None}
    return [
        replace(node, id=places[node.id], parent=places[node.parent], conversation=0)  # pyright: ignore
        for node in nodes
    ]


# --- JSON ---


def test_what_is_exported_is_imported_as_it_was(books: Store, capitals: int, tmp_path: Path):
    document = exported(books, capitals, tmp_path / "c.json")
    with Store(tmp_path / "other.db") as others:
        others.create(title="so that ids differ")
        others.add_node(1, None, "user")
        copy = importer.import_conversation(others, tmp_path / "c.json")
        assert without_ids(others.nodes(copy)) == without_ids(books.nodes(capitals))
        old, new = books.conversation(capitals), others.conversation(copy)
        assert new.imported and not old.imported
        old = replace(old, model=replace(old.model, folder=""))  # that of another machine
        assert replace(new, id=old.id, leaf=old.leaf, imported=False, updated=old.updated) == old
        assert [n.text for n in others.branch(copy)] == [n.text for n in books.branch(capitals)]
        latest = others.latest()
        assert latest and latest.id == copy
        again = exported(others, copy, tmp_path / "again.json")
    assert again.keys() == document.keys()
    assert [n["text"] for n in again["nodes"]] == [n["text"] for n in document["nodes"]]


texts = st.text(max_size=30)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "parent": st.integers(-1, 10),
            "role": st.sampled_from(["user", "assistant", "tool", "system"]),
            "text": texts,
            "thinking": texts,
            "ids": st.lists(st.integers(0, 2**32 - 1), max_size=5),
            "state": st.sampled_from(["complete", "cancelled"]),
            "settings": st.dictionaries(texts, st.none() | st.booleans() | st.integers() | texts, max_size=2),
        }
    ),
    max_size=6,
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(messages)
def test_any_tree_survives_the_way_through_a_file(made: list[dict[str, Any]]):
    folder = Path.home()
    with Store(folder / "any.db") as books:
        conversation = books.create()
        ids: list[int] = []
        for message in made:
            place = message["parent"] % (len(ids) + 1)
            content = {name: value for name, value in message.items() if name not in ("parent", "role")}
            ids.append(books.add_node(conversation, [None, *ids][place], message["role"], **content))
        export.export_conversation(books, conversation, folder / "any.json", overwrite=True)
        copy = importer.import_conversation(books, folder / "any.json")
        assert without_ids(books.nodes(copy)) == without_ids(books.nodes(conversation))


def test_a_reply_that_was_streaming_arrives_as_stopped(books: Store, tmp_path: Path):
    conversation = books.create()
    books.add_node(conversation, None, "assistant", text="half", state="streaming")
    export.export_conversation(books, conversation, tmp_path / "c.json")
    assert books.nodes(importer.import_conversation(books, tmp_path / "c.json"))[0].state == "cancelled"


def change(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = to

    return apply


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change("format", to="other"), "not a conversation exported by qchat"),
        (change("version", to=2), "newer qchat"),
        (change("version", to="1"), "version is '1'"),
        (change("version", to=True), "version is True"),
        (change("title", to=3), "title is 3, wanted text"),
        (change("settings", to=[]), "settings is \\[\\], wanted an object"),
        (change("model", to="m"), "model is a JSON str"),
        (change("model", "folder", to={}), "folder is {}"),
        (change("created", to=-1), "created is -1, wanted seconds"),
        (change("created", to=10**400), "created is 1000"),
        (change("created", to=None), "created is None"),
        (change("leaf", to=999), "leaf is 999"),
        (change("leaf", to=[1]), "leaf is \\[1\\]"),
        (change("leaf", to=True), "leaf is True"),
        (change("nodes", to={}), "nodes is {}, wanted a list"),
        (change("nodes", 0, to=None), "message 1 is a JSON NoneType"),
        (change("nodes", 0, "id", to=-1), "message 1: id is -1"),
        (change("nodes", 1, "id", to=1), "message 2: id 1 is not unique"),
        (change("nodes", 1, "id", to=2**70), "message 2: id is"),
        (change("nodes", 0, "parent", to=5), "message 1: parent is 5, wanted the id of an earlier"),
        (change("nodes", 1, "parent", to=[]), "message 2: parent"),
        (change("nodes", 0, "role", to="robot"), "message 1: role is 'robot', wanted one of system"),
        (change("nodes", 0, "role", to=[]), "message 1: role is \\[\\]"),
        (change("nodes", 0, "state", to="lost"), "state is 'lost'"),
        (change("nodes", 0, "text", to=None), "text is None"),
        (change("nodes", 0, "ids", to=[1, -1]), "ids contains -1"),
        (change("nodes", 0, "ids", to=[2**32]), "ids contains 4294967296"),
        (change("nodes", 0, "ids", to=[1.0]), "ids contains 1.0"),
        (change("nodes", 0, "ids", to=[True]), "ids contains True"),
        (change("nodes", 0, "ids", to=[None]), "ids contains None"),
        (change("nodes", 0, "ids", to="12"), "ids is '12', wanted a list"),
        (change("nodes", 2, "tool_calls", to=[3]), "tool call is a JSON int"),
        (change("nodes", 2, "tool_calls", to=[{"arguments": {}}]), "has no function name"),
        (change("nodes", 2, "tool_calls", to=[{"name": "f", "arguments": "{}"}]), "arguments is '{}'"),
        (change("nodes", 0, "stats", to=nested(50)), "nests deeper"),
        (change("nodes", 0, "stats", to={"x": nested(40)}), "nests deeper"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_a_sentence_and_nothing_is_added(
    books: Store, capitals: int, tmp_path: Path, edit: Callable[[dict[str, Any]], None], words: str
):
    path = tmp_path / "c.json"
    document = exported(books, capitals, path)
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=words) as caught:
        importer.import_conversation(books, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert [item.id for item in books.conversations()] == [capitals]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{", b"[" * 100_000, b'{"a": NaN}', b"{}"])
def test_a_file_that_is_no_json_object_of_ours_is_refused(books: Store, tmp_path: Path, content: bytes):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=re.escape(str(path))):
        importer.import_conversation(books, path)
    with pytest.raises(StoreError, match="No such file"):
        importer.import_conversation(books, tmp_path / "missing.json")


def test_imports_are_bounded(books: Store, capitals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "c.json"
    export.export_conversation(books, capitals, path)
    for name, words in (
        ("MAX_IMPORT_NBYTES", "larger"),
        ("MAX_NODES", "more than 2"),
        ("MAX_IDS", "more than 2"),
    ):
        with monkeypatch.context() as bounded, pytest.raises(StoreError, match=words):
            bounded.setattr(importer, name, 2)
            importer.import_conversation(books, path)


# --- files ---


def test_the_suffix_names_the_format(books: Store, capitals: int, tmp_path: Path):
    for suffix, begin in ((".md", "# Capitals"), (".HTML", "<!doctype html>"), (".json", '{"format"')):
        path = tmp_path / f"c{suffix}"
        export.export_conversation(books, capitals, path)
        assert path.read_text().startswith(begin)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match=r"c\.txt.*\.md, \.html, \.json"):
        export.export_conversation(books, capitals, tmp_path / "c.txt")


def test_a_file_is_replaced_only_when_asked_to(books: Store, capitals: int, tmp_path: Path):
    path = tmp_path / "c.md"
    path.write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        export.export_conversation(books, capitals, path)
    assert path.read_text() == "mine"
    export.export_conversation(books, capitals, path, overwrite=True)
    assert path.read_text() != "mine"


def test_a_file_that_cannot_be_written_is_named(books: Store, capitals: int, tmp_path: Path):
    with pytest.raises(StoreError, match=r"missing/c\.md"):
        export.export_conversation(books, capitals, tmp_path / "missing" / "c.md")
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(StoreError, match=r"folder\.md"):
        export.export_conversation(books, capitals, tmp_path / "folder.md", overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*.md*")) == ["folder.md"]


# --- Markdown ---


def test_markdown_reads_as_it_was_said(books: Store, capitals: int):
    page = export.to_markdown(books.conversation(capitals), books.branch(capitals))
    head, body = page.split("\n\n## System\n\n")
    assert re.fullmatch(r"# Capitals\n\n\*Qwen3\.6-27B · \d{4}-\d\d-\d\d \d\d:\d\d UTC\*", head)
    call = '```json\n{\n  "name": "look",\n  "arguments": {\n    "up": [\n      "France"\n    ]\n  }\n}\n```'
    assert body == (
        f"Be brief.\n\n## User\n\nFrance?\n\n## Assistant\n\n{call}\n\n"
        "## Tool\n\n````\n```\nParis\n```\n````\n\n## Assistant\n\n> *Thought*\n>\n> Yes.\n\n**Paris**\n"
    )


def test_another_branch_can_be_written(books: Store, capitals: int):
    stopped = books.nodes(capitals)[1]
    page = export.to_markdown(books.conversation(capitals), books.branch(capitals, stopped.id))
    assert page.endswith("## Assistant (stopped)\n\n> *Thought*\n>\n> One\n>\n> `two`\n\nPar\n")


# --- HTML ---


class Page(HTMLParser):
    """Tags, attributes and text, as an independent parser sees them."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.said: dict[str, str] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str):
        assert self.open.pop() == tag

    def handle_data(self, data: str):
        place = "/".join(self.open[-2:])
        self.said[place] = self.said.get(place, "") + data


HARMLESS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "section", "pre", "details", "summary"),
    "footer",
}


@pytest.mark.parametrize("text", [NASTY, "plain", "\n\nleading", "{title} {0}"])
def test_a_page_holds_every_text_as_text_and_nothing_that_acts(books: Store, text: str):
    conversation = books.create(title=text, system=text, model=ModelIdentity(text))
    node = books.add_node(conversation, None, "user", text=text, thinking=text)
    books.add_node(
        conversation, node, "tool", text=text, tool_calls=[{"name": text, "arguments": {text: text}}]
    )
    page = Page(export.to_html(books.conversation(conversation), books.branch(conversation)))
    assert page.open == [] and set(page.tags) <= HARMLESS
    assert {name for name, _ in page.attributes} <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
    }
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    clean = text.replace("\x00", "�").replace("\x1b", "�")
    assert page.said["details/pre"] == f"\n{clean}"  # the newline after <pre> is not shown
    assert page.said["section/pre"].count(clean) >= 3
    assert page.said["head/title"] == clean.strip() or "\n" in text


ANSWER = """\
# Title

A *word*, `code` and ~~less~~, [a link](https://example.org/a?b=c).

| a | b |
|---|---|
| 1 | <2> |

```python
if a < b: pass
```
- one
- two
"""
EVIL = """\
<script>alert(1)</script> <img src=x onerror=alert(1)> <a href="javascript:alert(1)">a</a>

[js](javascript:alert(1)) [data](data:text/html,<script>1</script>) ![picture](https://example.org/a.png)
[file](file:///etc/passwd) <javascript:alert(1)> \x1b[2J

```"><script>alert(1)</script>
x
```
"""
LAID_OUT = HARMLESS | {
    *("p", "em", "code", "s", "a", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"),
}


def answered(books: Store, text: str) -> Page:
    conversation = books.create(title="t")
    books.add_node(conversation, books.add_node(conversation, None, "user", text="q"), "assistant", text=text)
    return Page(export.to_html(books.conversation(conversation), books.branch(conversation)))


def test_the_markdown_of_an_answer_is_laid_out(books: Store):
    page = answered(books, ANSWER)
    assert page.open == [] and {"em", "s", "table", "td", "code", "li"} <= set(page.tags) <= LAID_OUT
    assert page.said["section/h1"] == "Title"
    assert page.said["pre/code"] == "if a < b: pass\n"
    assert page.said["tr/td"] == "1<2>"
    assert ("href", "https://example.org/a?b=c") in page.attributes


def test_an_answer_acts_and_loads_nothing(books: Store):
    page = answered(books, EVIL)
    assert page.open == [] and set(page.tags) <= LAID_OUT
    links = [value or "" for name, value in page.attributes if name in ("href", "src")]
    assert links == ["https://example.org/a.png"]
    names = {name for name, _ in page.attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "href"}
    assert "<script>alert(1)</script>" in page.said["section/p"]
    assert "\x1b" not in "".join(page.said.values())


def test_thoughts_are_folded(books: Store, capitals: int):
    page = export.to_html(books.conversation(capitals), books.branch(capitals))
    assert "<details><summary>Thought</summary><pre>\nYes.</pre></details>" in page
    assert "<details open" not in page


def test_an_untitled_conversation_has_a_heading():
    bare = Conversation(1, "", "", {}, ModelIdentity(), False, None, 0.0, 0.0)
    assert export.to_markdown(bare, []) == "# Conversation\n\n*1970-01-01 00:00 UTC*\n"
    assert "<h1>Conversation</h1>" in export.to_html(bare, [])


def test_numbers_that_no_float_holds_are_refused_wherever_they_are(
    books: Store, capitals: int, tmp_path: Path
):
    path = tmp_path / "c.json"
    for place in (("nodes", 1, "stats"), ("nodes", 0, "settings"), ("settings",)):
        document = exported(books, capitals, path)
        change(*place, to={"prompt_tokens": [{"x": -(10**400)}]})(document)
        path.write_text(json.dumps(document))
        with pytest.raises(StoreError, match="holds a number that is out of range"):
            importer.import_conversation(books, path)


# --- which model wrote what ---


@pytest.fixture
def two_models(books: Store) -> int:
    """A conversation whose replies two models wrote, and one that nobody signed."""
    conversation = books.create(model=ModelIdentity(name="small"))
    node = None
    for place, name in enumerate(("", "small", "small", "large")):
        node = books.add_node(conversation, node, "user", text=f"question {place}")
        node = books.add_node(conversation, node, "assistant", text=f"answer {place}", model_name=name)
    return conversation


def test_the_model_is_named_where_another_one_replies(books: Store, two_models: int):
    about, branch = books.conversation(two_models), books.branch(two_models)
    markdown, page = export.to_markdown(about, branch), export.to_html(about, branch)
    for text in (markdown, page):
        assert text.count("Assistant · small") == text.count("Assistant · large") == 1
        assert text.index("answer 0") < text.index("· small") < text.index("answer 1")
        assert text.index("answer 2") < text.index("Assistant · large") < text.index("answer 3")
        assert "small, large · " in text


def test_the_models_of_replies_survive_export_and_import(books: Store, two_models: int, tmp_path: Path):
    file = tmp_path / "two.json"
    export.export_conversation(books, two_models, file)
    copy = importer.import_conversation(books, file)
    assert [node.model_name for node in books.branch(copy) if node.role == "assistant"] == [
        "",
        "small",
        "small",
        "large",
    ]
    assert books.model_names() == {two_models: ["large", "small"], copy: ["large", "small"]}


# --- results ---


def test_results_are_exported_and_imported_with_their_conversation(
    books: Store, capitals: int, tmp_path: Path
):
    parts = [{"kind": "Lines", "lines": ["25.0 tok/s"], "style": ""}]
    books.add_result(capitals, 1, f"bench {NASTY}", f"25.0 tok/s {NASTY}", parts)
    about, branch, results = books.conversation(capitals), books.branch(capitals), books.results(capitals)
    markdown, page = export.to_markdown(about, branch, results), export.to_html(about, branch, results)
    for text in (markdown, page):
        assert "25.0 tok/s" in text and "after turn 1" in text
        assert text.index("Yes.") < text.index("25.0 tok/s")
    assert "<script" not in page and "<img" not in page
    file = tmp_path / "capitals.json"
    assert exported(books, capitals, file)["results"][0]["parts"] == parts
    (copied,) = books.results(importer.import_conversation(books, file))
    assert replace(copied, id=results[0].id, created=results[0].created) == results[0]


@pytest.mark.parametrize(
    ("results", "wanted"),
    [
        ({}, "results is"),
        ([7], "result 1 is a JSON int"),
        ([{"turn": -1}], "result 1: turn is -1"),
        ([{"turn": 1, "parts": "x"}], "result 1: parts is"),
        ([{"turn": 1, "text": "x" * (records.MAX_RESULT_NBYTES + 1)}], "result 1 is larger"),
    ],
)
def test_results_of_a_file_are_checked_before_anything_is_added(
    books: Store, capitals: int, tmp_path: Path, results: Any, wanted: str
):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(exported(books, capitals, file) | {"results": results}))
    with pytest.raises(StoreError, match=wanted):
        importer.import_conversation(books, file)
    assert len(books.conversations()) == 1
