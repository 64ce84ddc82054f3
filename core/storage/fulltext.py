"""Full-text search in titles and messages: SQLite's FTS5, or a plain scan where it is not compiled in.

The index is brought up to date when somebody searches, so that a streaming reply costs nothing here and a
build without FTS5 can write to the same file. Scripts without spaces between words are always scanned.
"""

import unicodedata

from ..errors import StoreError
from .database import Database, Execute

MODULE = "fts5"
SNIPPET_TOKENS = 16
SNIPPET_CHARACTERS = 100
SOURCES = {"conversations": "title", "nodes": "text"}  # each has an index of its own, `TABLE_index`
INDEXED = f"""
    SELECT rowid AS conversation, NULL AS node,
           snippet(conversations_index, 0, '', '', '…', {SNIPPET_TOKENS}) AS snippet
    FROM conversations_index WHERE conversations_index MATCH ?
    UNION ALL
    SELECT nodes.conversation, nodes.id, snippet(nodes_index, 0, '', '', '…', {SNIPPET_TOKENS})
    FROM nodes_index JOIN nodes ON nodes.id = nodes_index.rowid WHERE nodes_index MATCH ?"""
SCANNED = """
    SELECT id AS conversation, NULL AS node, excerpt(title, ?) AS snippet
    FROM conversations WHERE excerpt(title, ?) IS NOT NULL
    UNION ALL
    SELECT conversation, id, excerpt(text, ?) FROM nodes WHERE excerpt(text, ?) IS NOT NULL"""


class FullText:
    """Queries over the tables in SOURCES, whose column `indexed` says whether the index knows the row."""

    def __init__(self, database: Database):
        self._database = database
        database.define("excerpt", excerpt)

    def query(self, words: str) -> tuple[str, tuple[str, ...]]:
        """SQL with columns conversation, node (null for a title) and snippet, and the values for it."""
        if not words.split():
            raise StoreError("there is nothing to search for: give at least one word")
        if not _has_words(words) or _has_unspaced(words) or not self._update():
            return SCANNED, (words,) * 4
        return INDEXED, (_phrases(words),) * 2

    def forget(self, execute: Execute) -> None:
        """Within a transaction that deleted rows: take their text out of the index."""
        if not (self._available() and self._exists()):
            return
        for table in SOURCES:
            execute(f"DELETE FROM {table}_index WHERE rowid NOT IN (SELECT id FROM {table})")
            # the index only marks deleted words until it is merged
            execute(f"INSERT INTO {table}_index({table}_index) VALUES ('optimize')")

    def _update(self) -> bool:
        """Index what has changed; False where there can be no index."""
        if not self._create():
            return False
        waiting = " UNION ALL ".join(f"SELECT 1 FROM {table} WHERE NOT indexed" for table in SOURCES)
        if self._database.read(f"{waiting} LIMIT 1"):
            with self._database.write() as execute:
                for table, column in SOURCES.items():
                    execute(
                        f"INSERT OR REPLACE INTO {table}_index(rowid, {column})"
                        f" SELECT id, {column} FROM {table} WHERE NOT indexed"
                    )
                    execute(f"UPDATE {table} SET indexed = 1 WHERE NOT indexed")
        return True

    def _create(self) -> bool:
        if not self._available():
            return False
        if not self._exists():
            with self._database.write() as execute:
                for table, column in SOURCES.items():
                    execute(
                        f"CREATE VIRTUAL TABLE IF NOT EXISTS {table}_index"
                        f" USING {MODULE}({column}, tokenize = 'unicode61 remove_diacritics 2')"
                    )
        return True

    def _available(self) -> bool:
        return bool(self._database.read("SELECT 1 FROM pragma_module_list WHERE name = ?", MODULE))

    def _exists(self) -> bool:
        return bool(self._database.read("SELECT 1 FROM sqlite_master WHERE name = 'nodes_index'"))


def excerpt(text: str, words: str) -> str | None:
    """One line of `text` around the first of `words`; None unless it holds all of them, in any case."""
    folded = text.casefold()
    places = [folded.find(word) for word in words.casefold().split()]
    if min(places) < 0:
        return None
    start = max(0, min(places) - SNIPPET_CHARACTERS // 3)
    end = start + SNIPPET_CHARACTERS
    line = " ".join(text[start:end].split())
    return f"{'…' * (start > 0)}{line}{'…' * (end < len(text))}"


def _phrases(words: str) -> str:
    """Every word as a phrase, the last one as the beginning of a word: nothing in it is FTS5's own syntax."""
    quoted = ['"{}"'.format(word.replace('"', '""')) for word in words.split() if _has_words(word)]
    return f"{' '.join(quoted)}*"


def _has_words(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _has_unspaced(text: str) -> bool:
    """Whether it holds letters of Thai, Chinese, Japanese and their like, which lie above U+0E00."""
    return any(ord(character) > 0x0E00 and unicodedata.category(character) == "Lo" for character in text)
