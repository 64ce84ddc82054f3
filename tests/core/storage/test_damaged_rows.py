"""A damaged conversation is named and can be deleted; the sound ones stay listed, found and readable."""

import sqlite3
from pathlib import Path

import pytest

from qchat.core.errors import StoreError
from qchat.core.storage import export, importer
from qchat.core.storage.store import Store

DAMAGES = {
    "title": "title = x'ff00'",
    "title that is no UTF-8": "title = CAST(x'ff' AS TEXT)",
    "system": "system = x'05'",
    "settings": "settings = '[1]'",
    "settings nested deeply": f"settings = '{'[' * 100_000}'",
    "settings cut off": "settings = '{'",
    "settings of bytes": "settings = x'7b7d'",
    "model": "model = '{\"name\": 5}'",
    "model that is a list": "model = '[]'",
    "created": "created = 1e300",
    "created before 1970": "created = -1e300",
    "created of text": "created = 'x'",
    "updated": "updated = 'x'",
}
NODE_DAMAGES = {
    "text": "text = x'ff'",
    "thinking": "thinking = x'07'",
    "tool calls": "tool_calls = '[1]'",
    "tool calls without names": "tool_calls = '[{\"arguments\": {}}]'",
    "arguments": 'tool_calls = \'[{"name": "f", "arguments": 3}]\'',
    "ids": "ids = 'x'",
    "ids cut off": "ids = x'789c'",
    "stats": "stats = '3'",
    "created": "created = 'x'",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two conversations, of which the second will be damaged."""
    with Store(tmp_path / "c.db") as store:
        for title in ("sound", "other"):
            id = store.create(title=title)
            store.add_node(id, None, "user", text=f"the {title} question")
    return tmp_path / "c.db"


def damage(path: Path, sql: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(sql)
    connection.commit()
    connection.close()


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_conversation_hides_no_other_and_can_be_deleted(path: Path, tmp_path: Path, change: str):
    damage(path, f"UPDATE conversations SET {change} WHERE id = 2")
    with Store(path) as store:
        listed = store.conversations()
        assert "sound" in [one.title for one in listed]
        assert {one.id for one in listed} == {1, 2}
        readable = "UTF-8" in change or change.startswith("title = CAST")  # read with U+FFFD in its title
        assert next(one for one in listed if one.id == 2).damaged == (not readable)
        assert [hit.conversation for hit in store.search("sound")][:1] == [1]
        assert (store.latest() or listed[0]).id == (2 if readable else 1)
        if not readable:
            for act in (
                store.conversation,
                lambda id: export.export_conversation(store, id, tmp_path / "x.html"),
            ):
                with pytest.raises(StoreError, match="is damaged: conversation 2 cannot be read"):
                    act(2)
        store.delete(2)
        assert [one.id for one in store.conversations()] == [1]


@pytest.mark.parametrize("change", NODE_DAMAGES.values(), ids=NODE_DAMAGES)
def test_a_damaged_message_is_named_wherever_it_is_read(path: Path, tmp_path: Path, change: str):
    damage(path, f"UPDATE nodes SET {change} WHERE conversation = 2")
    with Store(path) as store:
        assert [one.title for one in store.conversations()] == ["other", "sound"]
        assert store.search("sound question")
        for name in ("x.html", "x.md", "x.json"):
            with pytest.raises(StoreError, match="is damaged: message 2 cannot be read"):
                export.export_conversation(store, 2, tmp_path / name)
        store.delete(2)


def test_an_import_names_no_folder_and_an_export_shows_none(path: Path, tmp_path: Path):
    with Store(path) as store:
        export.export_conversation(store, 1, tmp_path / "c.json")
        text = (tmp_path / "c.json").read_text()
        assert "folder" not in text
        planted = text.replace('"model": {', '"model": {"folder": "/planted", ', 1)
        (tmp_path / "c.json").write_text(planted)
        assert store.conversation(importer.import_conversation(store, tmp_path / "c.json")).model.folder == ""
