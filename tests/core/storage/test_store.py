"""The store: trees of messages, search, deletion, privacy, and files that must be refused untouched."""

import os
import random
import sqlite3
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.errors import StoreError
from qchat.core.events import Done, Performance
from qchat.core.storage import database, fulltext, records, store
from qchat.core.storage.records import ModelIdentity, Role, pack_ids, reply_stats, unpack_ids
from qchat.core.storage.state_files import claim, state_path
from qchat.core.storage.store import Store, StreamWriter
from qchat.core.text.template import ROLES
from tests.fake_clock import FakeClock

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "conversations.db"


def ticking() -> FakeClock:
    """Return a clock on which no two readings are equal."""
    return FakeClock(1_000_000.0, step=1)


@pytest.fixture
def books(path: Path) -> Iterator[Store]:
    with Store(path, ticking()) as opened:
        yield opened


def talk(books: Store, *texts: str, title: str = "") -> int:
    """A conversation of one branch: the user begins, roles alternate."""
    conversation = books.create(title=title)
    parent = None
    for number, text in enumerate(texts):
        parent = books.add_node(conversation, parent, ("user", "assistant")[number % 2], text=text)
    return conversation


def texts(books: Store, conversation: int, leaf: int | None = None) -> list[str]:
    return [node.text for node in books.branch(conversation, leaf)]


def refused(action: Callable[[], object], *words: str) -> None:
    """One sentence that has the words."""
    with pytest.raises(StoreError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence


# --- the tree ---


def test_everything_written_is_read_after_reopening(path: Path):
    model = ModelIdentity("Qwen3.6", "/models/q", "c0ffee", "5 shards", "beef")
    done = Done(
        "stop", text="Paris.", thinking="hm", generated_tokens=3, performance=Performance(seconds=1.5)
    )
    with Store(path) as books:
        conversation = books.create(title="Capitals", system="Be brief.", settings={"seed": 1}, model=model)
        question = books.add_node(conversation, None, "user", text="France?", ids=[5, 6])
        answer = books.add_node(
            conversation,
            question,
            "assistant",
            text="Paris.",
            thinking="hm",
            tool_calls=[{"name": "f", "arguments": {"x": [1]}}],
            ids=range(100_000),
            settings={"temperature": 0.5, "stop": ["\n"]},
            stats=reply_stats(done),
        )
    with Store.open(path) as books:
        found = books.conversation(conversation)
        assert (found.title, found.system, found.settings, found.model) == (
            "Capitals",
            "Be brief.",
            {"seed": 1},
            model,
        )
        assert (found.leaf, found.imported) == (answer, False)
        first, second = books.branch(conversation)
        assert (first.role, first.text, first.ids, first.parent) == ("user", "France?", [5, 6], None)
        assert (second.parent, second.thinking, second.state) == (question, "hm", "complete")
        assert second.ids == list(range(100_000))
        assert second.tool_calls == [{"name": "f", "arguments": {"x": [1]}}]
        assert second.settings == {"temperature": 0.5, "stop": ["\n"]}
        assert second.stats["performance"]["seconds"] == 1.5
        assert not {"text", "thinking", "raw_text"} & second.stats.keys()
        assert books.nodes(conversation) == [first, second]


def test_a_branch_runs_from_the_first_message_to_any_leaf(books: Store):
    conversation = talk(books, "q", "a1")
    question, answer = books.branch(conversation)
    retry = books.add_node(conversation, question.id, "assistant", text="a2")
    edited = books.add_node(conversation, None, "user", text="q2")
    assert texts(books, conversation) == ["q2"]
    assert texts(books, conversation, retry) == ["q", "a2"]
    parents = {node.id: node.parent for node in books.nodes(conversation)}
    assert parents == {question.id: None, answer.id: question.id, retry: question.id, edited: None}
    books.set_leaf(conversation, answer.id)
    assert texts(books, conversation) == ["q", "a1"]
    books.set_leaf(conversation, None)
    assert books.branch(conversation) == []
    assert [node.text for node in books.nodes(conversation)] == ["q", "a1", "a2", "q2"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=15), st.integers(0, 14))
def test_branches_of_random_trees_follow_the_parents(choices: list[int], wanted: int):
    with Store(Path(os.environ["HOME"]) / "trees.db") as books:
        conversation = books.create()
        parents: dict[int, int | None] = {}
        for choice in choices:
            parent = [None, *parents][choice % (len(parents) + 1)]
            parents[books.add_node(conversation, parent, "user")] = parent
        leaf: int | None = list(parents)[wanted % len(parents)]
        expected = []
        while leaf is not None:
            expected.insert(0, leaf)
            leaf = parents[leaf]
        assert [node.id for node in books.branch(conversation, expected[-1])] == expected


def test_a_message_belongs_to_one_conversation(books: Store):
    mine, other = talk(books, "mine"), talk(books, "other")
    foreign = books.branch(other)[0].id
    for action in (
        lambda: books.add_node(mine, foreign, "assistant"),
        lambda: books.set_leaf(mine, foreign),
        lambda: books.branch(mine, foreign),
    ):
        refused(action, f"conversation {mine} has no message {foreign}")
    assert texts(books, mine) == ["mine"]


def test_what_is_not_there_is_named(books: Store):
    refused(lambda: books.conversation(7), "conversation 7")
    refused(lambda: books.add_node(7, None, "user"), "conversation 7")
    refused(lambda: books.update_node(9, text="x"), "message 9")
    refused(lambda: books.rename(7, "x"), "conversation 7")
    refused(lambda: books.delete(7), "conversation 7")
    refused(lambda: books.conversation(10**30), "too large")


def test_ids_that_are_no_words_are_refused(books: Store):
    conversation = books.create()
    for wrong in (-1, 2**32):
        refused(
            lambda wrong=wrong: books.add_node(conversation, None, "user", ids=[wrong]), "rejected the data"
        )
    assert books.nodes(conversation) == []


def test_a_closed_store_says_so(path: Path):
    books = Store(path)
    books.close()
    refused(books.conversations, "closed")


def test_unknown_roles_and_states_are_refused(books: Store):
    conversation = books.create()
    refused(lambda: books.add_node(conversation, None, "robot"), "CHECK")  # pyright: ignore[reportArgumentType]
    node = books.add_node(conversation, None, "user")
    refused(lambda: books.update_node(node, state="lost"), "CHECK")  # pyright: ignore[reportArgumentType]
    assert get_args(Role) == ROLES


def test_half_a_surrogate_pair_does_not_stop_the_chat(books: Store):
    conversation = talk(books, "a\ud83d", title="t\udc00")
    assert texts(books, conversation) == ["a?"]
    assert books.conversation(conversation).title == "t?"


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_ids_survive_packing(ids: list[int]):
    assert unpack_ids(pack_ids(ids)) == ids


def test_ids_lie_as_little_endian_words(monkeypatch: pytest.MonkeyPatch):
    packed = pack_ids([1, 0x01020304])
    assert zlib.decompress(packed) == bytes([1, 0, 0, 0, 4, 3, 2, 1])
    assert len(pack_ids(range(1000))) < 4_000
    monkeypatch.setattr(records, "MAX_IDS", 999)
    with pytest.raises(ValueError, match="999"):
        unpack_ids(pack_ids([0] * 1000))
    with pytest.raises((ValueError, zlib.error)):
        unpack_ids(packed[:-6])


# --- the list ---


def test_the_list_is_newest_first_by_what_was_written(books: Store):
    first, second, third = (talk(books, word) for word in ("one", "two", "three"))
    assert [item.id for item in books.conversations()] == [third, second, first]
    books.update_node(books.branch(first)[0].id, text="one!")
    assert [item.id for item in books.conversations(2)] == [first, third]
    books.rename(second, "Two")
    latest = books.latest()
    assert latest and latest.id == first
    assert [item.title for item in books.conversations()] == ["one", "three", "Two"]


def test_an_empty_store_has_no_latest(books: Store):
    assert books.latest() is None
    assert books.conversations() == []


def test_the_first_question_is_the_title_until_there_is_another(books: Store):
    conversation = talk(books, "Why  is\nthe sky " + "so " * 30 + "blue?")
    title = books.conversation(conversation).title
    assert title.startswith("Why is the sky so") and title.endswith("…") and len(title) == 60
    assert books.conversation(talk(books, "hello", title="Mine")).title == "Mine"


def test_settings_system_and_model_can_change(books: Store):
    conversation = talk(books, "x")
    books.update(conversation, system="s", settings={"seed": 2}, model=ModelIdentity("m"))
    found = books.conversation(conversation)
    assert (found.system, found.settings, found.model.name) == ("s", {"seed": 2}, "m")


# --- search, with the index and without ---


@pytest.fixture(params=["fts5", "none"])
def searched(request: pytest.FixtureRequest, books: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose SQLite has full-text search, and one whose has not."""
    monkeypatch.setattr(fulltext, "MODULE", request.param)
    return books


def test_titles_and_messages_are_found(searched: Store):
    capitals = talk(searched, "The capital of France?", "Paris, on the Seine.", title="Capitals")
    recipe = talk(searched, "A soup", "Boil leeks from Paris.", title="Leek soup")
    hits = searched.search("paris")
    assert [(hit.conversation, hit.role) for hit in hits] == [(recipe, "assistant"), (capitals, "assistant")]
    assert "Boil leeks from Paris." in hits[0].snippet
    (title,) = searched.search("capitals")
    assert (title.node, title.role, title.title) == (None, None, "Capitals")
    assert [hit.conversation for hit in searched.search("PARIS sei")] == [capitals]
    assert [item.id for item in searched.conversations(search="soup")] == [recipe]
    assert searched.search("nothing") == []
    assert len(searched.search("paris", limit=1)) == 1


def test_a_search_sees_what_was_written_since_the_last_one(searched: Store):
    conversation = talk(searched, "apple")
    assert len(searched.search("apple")) == 2
    node = searched.branch(conversation)[0].id
    searched.update_node(node, text="banana")
    searched.rename(conversation, "fruit")
    assert searched.search("apple") == []
    assert [hit.node for hit in searched.search("banana")] == [node]
    assert [hit.node for hit in searched.search("fruit")] == [None]


def test_search_words_are_never_a_query_language(searched: Store):
    conversation = talk(searched, 'C++ "and" NOT (this) 100% a_b * NEAR', title="t")
    for words in (
        '"',
        '"and"',
        "NOT",
        "(this)",
        "C++ NOT",
        "100%",
        "*",
        "a_b",
        "NEAR",
        "-",
        "text:this",
        "'",
    ):
        found = [hit.conversation for hit in searched.search(words)]
        assert found in ([conversation], []), words
    assert searched.search("NOT (this)")
    assert searched.search("%") == searched.search("100%")
    refused(lambda: searched.search("  "), "nothing to search for")


def test_scripts_without_spaces_are_searched_inside_their_runs(searched: Store):
    talk(searched, "巴黎是法国的首都", title="t")
    assert len(searched.search("法国")) == 1
    talk(searched, "Über Straßen", title="u")
    assert len(searched.search("über")) == 1


@pytest.mark.parametrize(
    "word", ["Rust", "rust", "numpy", "Toky", "v2", "排序", "東京", "Python", "Go", "한국어", "CPU"]
)
def test_words_among_scripts_without_spaces_are_found(searched: Store, word: str):
    talk(searched, "请用Rust写一个排序函数", "可以用numpy库，v2也行。東京はTokyoです。", title="用Python")
    talk(searched, "Go를 배우고 싶어요 한국어", "ใช้CPUเท่านั้น", title="t")
    (hit,) = searched.search(word)
    assert word.casefold() in hit.snippet.casefold() and "\u200b" not in hit.snippet


def test_what_was_indexed_without_setting_words_apart_is_indexed_anew(books: Store):
    talk(books, "请用Rust写", title="t")
    database = books._database
    with database.write() as execute:
        execute("CREATE VIRTUAL TABLE nodes_index USING fts5(text)")
        execute("INSERT INTO nodes_index(rowid, text) SELECT id, text FROM nodes")
        execute("UPDATE nodes SET indexed = 1")
    assert len(books.search("Rust")) == 1
    assert not database.read("SELECT 1 FROM sqlite_master WHERE name = 'nodes_index'")


def test_accents_do_not_matter_to_the_index(books: Store):
    talk(books, "un café noir", title="t")
    assert len(books.search("cafe")) == 1


def test_snippets_are_one_short_line(searched: Store):
    talk(searched, "filler words\n" * 500 + "the needle is here\n" + "more filler\n" * 500, title="t")
    (hit,) = searched.search("needle")
    assert "needle" in hit.snippet and "\n" not in hit.snippet and len(hit.snippet) < 200
    assert hit.snippet.startswith("…") and hit.snippet.endswith("…")


def test_a_build_without_full_text_search_writes_to_a_file_that_has_an_index(
    books: Store, monkeypatch: pytest.MonkeyPatch
):
    conversation = talk(books, "apple", title="t")
    assert books.search("apple")
    with monkeypatch.context() as without:
        without.setattr(fulltext, "MODULE", "none")
        talk(books, "pear apple", title="t")
        books.delete(conversation)
        assert books.purge() == 1
    assert [hit.snippet for hit in books.search("apple")] == ["pear apple"]


# --- deletion ---


def test_a_deleted_conversation_is_hidden_and_can_be_brought_back(searched: Store):
    conversation = talk(searched, "secret")
    searched.delete(conversation)
    assert searched.conversations() == [] and searched.search("secret") == []
    assert searched.latest() is None
    refused(lambda: searched.branch(conversation), f"conversation {conversation}")
    refused(lambda: searched.add_node(conversation, None, "user"), f"conversation {conversation}")
    searched.restore(conversation)
    assert texts(searched, conversation) == ["secret"]


def test_purging_spares_what_can_still_be_undone(books: Store):
    old, new = talk(books, "old"), talk(books, "new")
    books.delete(old)
    books.delete(new)
    assert books.purge(1.5) == 1
    refused(lambda: books.restore(old), "no longer exists")
    books.restore(new)
    assert books.purge() == 0
    assert texts(books, new) == ["new"]


def test_opening_purges_what_was_deleted_long_ago(path: Path):
    clock = ticking()
    with Store(path, clock) as books:
        books.delete(talk(books, "x"))
    with Store(path, clock) as books:
        books.restore(1)
        books.delete(1)
    clock.now += store.UNDO_SECONDS
    with Store(path, clock) as books:
        refused(lambda: books.restore(1), "conversation 1")


def test_nothing_of_a_purged_conversation_stays_in_the_files(books: Store, path: Path):
    conversation = talk(books, *["Xylophonist " * 300] * 4, title="Xylophonist")
    kept = talk(books, "kept")
    assert books.search("xylophonist")

    def anywhere() -> bool:
        return any(b"ylophonist" in file.read_bytes() for file in path.parent.iterdir())

    assert anywhere()
    books.delete(conversation)
    books.purge()
    assert not anywhere()
    assert texts(books, kept) == ["kept"]


def test_a_state_that_cannot_be_erased_keeps_no_other_one(path: Path):
    clock = ticking()
    with Store(path, clock) as books:
        for text in "abc":
            books.delete(talk(books, text))
        states = [books.states_folder / f"{number}.list" for number in (1, 2, 3)]
        states[0].mkdir(parents=True)  # a folder, which no file's erasure removes
        for number, state in enumerate(states[1:], 2):
            claim(books.states_folder, str(number), ["ab" * 16])
            assert state.exists()
        shared = state_path(books.states_folder, "ab" * 16)
        shared.write_bytes(b"x")
    clock.now += store.UNDO_SECONDS
    closed: list[database.Database] = []
    with pytest.MonkeyPatch.context() as patch:
        close = database.Database.close
        patch.setattr(database.Database, "close", lambda self: (closed.append(self), close(self)))
        refused(lambda: Store(path, clock), str(states[0]))
    assert [state.exists() for state in (*states, shared)] == [True, False, False, False]
    assert len(closed) == 1


def test_a_long_conversation_is_purged_whole(books: Store):
    """Deletion that follows each parent to its child ends at SQLite's limit of 1,000 levels."""
    drafts = [records.NodeDraft(n - 1 if n else None, "user", 0.0) for n in range(2500)]
    conversation = books.import_tree({}, drafts, 2499, 0.0)
    assert len(books.branch(conversation)) == 2500
    books.delete(conversation)
    assert books.purge() == 1


# --- the file ---


def test_file_and_folder_are_for_their_owner_only(books: Store, path: Path):
    talk(books, "x")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert files == {path.name: 0o600, f"{path.name}-wal": 0o600, f"{path.name}-shm": 0o600}


def test_a_file_that_others_could_read_is_closed_to_them(path: Path):
    Store(path).close()
    path.chmod(0o644)
    Store(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_newer_schema_is_refused_untouched(path: Path):
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    untouched(path, "newer qchat", "99", "update")


def test_an_older_schema_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as first:
        first.setattr(store, "MIGRATIONS", records.MIGRATIONS[:1])
        with Store(path):
            pass
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO conversations VALUES (1, 'old', '', '{}', '{}', 0, NULL, 0, 0, NULL, 0)"
        )
        connection.execute(
            "INSERT INTO nodes (id, conversation, role, text, created) VALUES (1, 1, 'user', 'kept', 0)"
        )
        connection.execute("UPDATE conversations SET leaf = 1")
    conversation = 1
    added = ("ALTER TABLE nodes ADD COLUMN mood TEXT NOT NULL DEFAULT 'calm'",)
    monkeypatch.setattr(store, "MIGRATIONS", (*records.MIGRATIONS, added))
    for _ in range(2):
        with Store(path) as books:
            assert texts(books, conversation) == ["kept"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT mood FROM nodes").fetchall() == [("calm",)]
        assert connection.execute("PRAGMA user_version").fetchone() == (len(records.MIGRATIONS) + 1,)


def test_a_migration_that_fails_leaves_the_old_schema(path: Path, monkeypatch: pytest.MonkeyPatch):
    Store(path).close()
    broken = ("ALTER TABLE nodes ADD COLUMN mood TEXT", "SELECT nonsense FROM nowhere")
    monkeypatch.setattr(store, "MIGRATIONS", (*records.MIGRATIONS, broken))
    refused(lambda: Store(path), "nowhere")
    monkeypatch.undo()
    with Store(path) as books:
        assert texts(books, talk(books, "x")) == ["x"]


def untouched(path: Path, *words: str) -> None:
    """Opening is refused in a sentence, and neither the file nor its neighbours change."""

    def content() -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in path.parent.iterdir() if not f.name.endswith("-shm")}

    before = content()
    refused(lambda: Store(path), *words)
    after = content()
    assert after.pop(f"{path.name}-wal", b"") == before.pop(f"{path.name}-wal", b"")
    assert after == before


@pytest.mark.parametrize("content", [b"x", b"not a database, " * 500, b"SQLite format 3\0", b"\0" * 9000])
def test_a_file_that_is_no_database_is_refused_untouched(path: Path, content: bytes):
    path.parent.mkdir()
    path.write_bytes(content)
    untouched(path, str(path), "nothing was changed")


def test_a_database_of_another_program_is_refused_untouched(path: Path):
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    untouched(path, "another program")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id = 7")
    untouched(path, "another program")


def test_a_file_that_was_cut_to_nothing_keeps_its_log(path: Path):
    """SQLite itself would take the file for a new one and delete the log with all that is in it."""
    path.parent.mkdir()
    path.write_bytes(b"")
    Path(f"{path}-wal").write_bytes(b"the only copy")
    untouched(path, "truncated")


@pytest.mark.parametrize("checked_nbytes", [0, 1 << 30])
@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_used_or_refused_but_never_crashes(
    path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, checked_nbytes: int
):
    """Bytes changed or cut: what opens can be used or says so; what does not open is left as it was."""
    monkeypatch.setattr(database, "MAX_CHECKED_NBYTES", checked_nbytes)
    with Store(path) as books:
        for number in range(30):
            talk(books, *[f"question {number} " * 20, "answer " * 50])
        books.search("question")
    content = damaged(path.read_bytes(), random.Random(seed))
    path.write_bytes(content)
    try:
        books = Store(path)
    except StoreError as problem:
        assert "\n" not in str(problem)
        assert path.read_bytes() == content
        return
    with books:
        try:
            for found in books.conversations(100):
                books.branch(found.id)
            talk(books, "one more")
            books.search("answer")
            books.delete(1)
            books.purge()
        except StoreError as problem:
            assert "\n" not in str(problem)


def damaged(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return content[: chance.randrange(100, len(content))]
    changed = bytearray(content)
    for _ in range(chance.choice([1, 40])):
        changed[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    return bytes(changed)


@pytest.mark.parametrize("column", ["ids = x'00ff'", "settings = '{'", "stats = x'80'", "tool_calls = ''"])
def test_one_damaged_message_is_named(books: Store, path: Path, column: str):
    conversation = talk(books, "x", "y")
    node = books.branch(conversation)[1].id
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"UPDATE nodes SET {column} WHERE id = {node}")
        connection.commit()
    refused(lambda: books.branch(conversation), "damaged", f"message {node}")
    assert [item.id for item in books.conversations()] == [conversation]


def test_a_folder_in_the_files_place_is_refused(path: Path):
    path.mkdir(parents=True)
    refused(lambda: Store(path), "not a regular file")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    refused(lambda: Store(tmp_path / "file" / "store.db"), "file/store.db")


def test_a_full_disk_is_said_and_nothing_is_half_written(books: Store, path: Path):
    conversation = talk(books, "kept")
    books._database.read("PRAGMA max_page_count = 1")  # never below what is there already
    refused(lambda: books.add_node(conversation, None, "user", text="x" * 1_000_000), "full", str(path))
    assert texts(books, conversation) == ["kept"]


def test_a_lock_is_waited_for_and_in_the_end_explained(
    books: Store, path: Path, monkeypatch: pytest.MonkeyPatch
):
    books._database.read("PRAGMA busy_timeout = 10")
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(database, "LOCK_TIMEOUT_SECONDS", 0.1)
        refused(lambda: talk(books, "x"), "locked", "another program")
        monkeypatch.setattr(database, "LOCK_TIMEOUT_SECONDS", 10.0)
        release = threading.Timer(0.3, lambda: other.execute("COMMIT"))
        release.start()
        assert texts(books, talk(books, "waited")) == ["waited"]
        release.join()


def test_a_second_connection_in_the_process_does_not_drop_the_first_ones_locks(books: Store, path: Path):
    """Closing any descriptor of a file ends all locks of the process on it, if SQLite does not know of it."""
    with books._database.write() as execute:
        execute("UPDATE conversations SET title = ''")
        Store(path).close()
        with closing(sqlite3.connect(path, timeout=0)) as other, pytest.raises(sqlite3.OperationalError):
            other.execute("BEGIN IMMEDIATE")


# --- a streaming reply ---


def last(books: Store) -> records.Node:
    """The last message of the first conversation."""
    return books.nodes(1)[-1]


def test_a_writer_keeps_to_its_pace_and_writes_the_end(books: Store):
    conversation = talk(books, "q")
    node = books.add_node(conversation, 1, "assistant", state="streaming")
    written: list[str] = []
    original = books.update_node
    books.update_node = lambda node, **content: (written.append(content["text"]), original(node, **content))[
        1
    ]
    writer = StreamWriter(books, node, period_seconds=0.1)
    text, ids = "", []
    begun = time.monotonic()
    while time.monotonic() - begun < 0.55:
        text += "x"
        ids.append(len(ids))
        writer.update(text, "thought", ids)
        time.sleep(0.002)
    assert 3 <= len(written) <= 7
    unfinished = last(books)
    assert unfinished.state == "streaming" and unfinished.thinking == "thought"
    assert len(unfinished.ids) == len(unfinished.text)
    writer.finish(text="end", thinking="", ids=[1], state="cancelled", stats={"finish_reason": "cancelled"})
    found = last(books)
    assert (found.text, found.thinking, found.ids, found.state) == ("end", "", [1], "cancelled")
    assert found.stats == {"finish_reason": "cancelled"}


def test_the_last_piece_before_a_long_silence_is_written_too(books: Store):
    node = books.add_node(talk(books, "q"), 1, "assistant", state="streaming")
    writer = StreamWriter(books, node, period_seconds=0.05)
    for text in ("a", "ab", "abc"):
        writer.update(text, "", [])
    deadline = time.monotonic() + 5
    while last(books).text != "abc" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert last(books).text == "abc"
    writer.finish(text="abcd")
    assert (last(books).text, last(books).state) == ("abcd", "complete")


def test_a_failed_write_is_told_to_the_one_who_streams(books: Store):
    conversation = talk(books, "q")
    writer = StreamWriter(books, 1, period_seconds=0.01)
    books.delete(conversation)
    books.purge()

    def stream() -> None:
        for _ in range(500):
            writer.update("x", "", [])
            time.sleep(0.01)

    refused(stream, "message 1")
    refused(lambda: writer.finish(text="x"), "message 1")


def test_many_threads_share_one_store(books: Store):
    conversation = books.create()

    def add(name: int) -> None:
        for number in range(10):
            books.add_node(conversation, None, "user", text=f"{name} {number}")
            books.conversations()

    threads = [threading.Thread(target=add, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({node.text for node in books.nodes(conversation)}) == 40


# --- results ---


def test_results_are_kept_in_order_with_their_conversation_only(books: Store):
    first, second = books.create(), books.create()
    books.add_result(first, 0, "inspect", "16 bits", [{"kind": "Lines"}])
    books.add_result(second, 1, "plan", "4 GB", [])
    books.add_result(first, 2, "bench", "25 tok/s", [])
    assert [(one.turn, one.title, one.text) for one in books.results(first)] == [
        (0, "inspect", "16 bits"),
        (2, "bench", "25 tok/s"),
    ]
    assert books.results(first)[0].parts == [{"kind": "Lines"}]
    refused(lambda: books.add_result(99, 0, "x", "y", []), "no conversation 99")


def test_results_take_a_bounded_room(books: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "MAX_RESULTS_NBYTES", 3000)
    one, other = books.create(), books.create()
    books.add_result(other, 0, "kept", "y" * 2000, [])
    for number in range(9):
        books.add_result(one, number, "bench", "é" * 450, [])
    assert [result.turn for result in books.results(one)] == [6, 7, 8]
    assert len(books.results(other)) == 1
    refused(lambda: books.add_result(one, 9, "huge", "x" * records.MAX_RESULT_NBYTES, []), "too large")
    assert len(books.results(one)) == 3


def test_results_are_erased_with_their_conversation(books: Store, path: Path):
    conversation = books.create()
    books.add_result(conversation, 0, "bench", "a secret figure", [])
    books.delete(conversation)
    books.purge()
    books.close()
    assert all(b"secret figure" not in file.read_bytes() for file in path.parent.glob(f"{path.name}*"))


def test_a_damaged_result_hides_no_other(books: Store, path: Path):
    conversation = books.create()
    for title in ("first", "second"):
        books.add_result(conversation, 0, title, "text", [])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE results SET parts = '[' WHERE title = 'first'")
    assert [one.title for one in books.results(conversation)] == ["second"]


def test_replies_of_an_older_schema_name_no_model(path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as first:
        first.setattr(store, "MIGRATIONS", records.MIGRATIONS[:2])
        Store(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO conversations VALUES (1, 'old', '', '{}', '{}', 0, NULL, 0, 0, NULL, 0)"
        )
        connection.execute(
            "INSERT INTO nodes (id, conversation, role, text, created) VALUES (1, 1, 'assistant', 'kept', 0)"
        )
    with Store(path) as books:
        assert [(node.text, node.model_name) for node in books.nodes(1)] == [("kept", "")]
        assert books.results(1) == [] and books.model_names() == {}


def test_questions_are_counted_on_all_branches(tmp_path: Path):
    with Store(tmp_path / "counted.db") as store:
        one, two, empty = (store.create(model=ModelIdentity("m")) for _ in range(3))
        for question in ("a", "b"):
            asked = store.add_node(one, None, "user", text=question)
            store.add_node(one, asked, "assistant", text="x")
        store.add_node(two, None, "user", text="c")
        assert store.question_counts() == {one: 2, two: 1} and empty not in store.question_counts()
