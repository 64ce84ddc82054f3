"""Full-text search in titles and messages: SQLite's FTS5, or a full scan if SQLite was built without it.

Each search updates the index first. So streaming a reply costs nothing here, and a build without FTS5 can
write to the same file. Scripts without spaces between words are scanned; words of other scripts among them
are set apart in the index.
"""

import re
import unicodedata

from ..errors import StoreError
from .database import Database, Execute

MODULE = "fts5"
SNIPPET_TOKENS = 16
SNIPPET_CHARACTERS = 100
# scripts without spaces between words: Thai to Myanmar, Khmer, Chinese, Japanese, Korean
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
_BORDER = re.compile(rf"(?<=[{_UNSPACED}])(?=[^\W{_UNSPACED}])|(?<=[^\W{_UNSPACED}])(?=[{_UNSPACED}])")
_SEPARATOR = "\u200b"  # ends a word of the index and is not seen in a snippet
INDEXED_COLUMNS = {"conversations": "title", "nodes": "text"}  # the index of a table is `TABLE_words_index`
INDEX_QUERY = f"""
    SELECT rowid AS conversation, NULL AS node,
           replace(snippet(conversations_words_index, 0, '', '', '…', {SNIPPET_TOKENS}), '{_SEPARATOR}', '')
           AS snippet
    FROM conversations_words_index WHERE conversations_words_index MATCH ?
    UNION ALL
    SELECT nodes.conversation, nodes.id,
           replace(snippet(nodes_words_index, 0, '', '', '…', {SNIPPET_TOKENS}), '{_SEPARATOR}', '')
    FROM nodes_words_index JOIN nodes ON nodes.id = nodes_words_index.rowid WHERE nodes_words_index MATCH ?"""
SCAN_QUERY = """
    SELECT id AS conversation, NULL AS node, excerpt(CAST(title AS BLOB), ?) AS snippet
    FROM conversations WHERE excerpt(CAST(title AS BLOB), ?) IS NOT NULL
    UNION ALL
    SELECT conversation, id, excerpt(CAST(text AS BLOB), ?)
    FROM nodes WHERE excerpt(CAST(text AS BLOB), ?) IS NOT NULL"""


class FullText:
    """Search over the tables in INDEXED_COLUMNS; their column `indexed` marks rows that the index covers."""

    def __init__(self, database: Database):
        self._database = database
        database.define_function("excerpt", excerpt, 2)
        database.define_function("words_apart", words_apart, 1)

    def query(self, words: str) -> tuple[str, tuple[str, ...]]:
        """Return SQL and its values; the columns are conversation, node (null for a title) and snippet.

        Raises StoreError if `words` is blank.
        """
        if not words.split():
            raise StoreError("nothing to search for: enter at least one word")
        if not _has_words(words) or _has_unspaced_script(words) or not self._update_index():
            return SCAN_QUERY, (words,) * 4
        return INDEX_QUERY, (_phrases(words),) * 2

    def remove_deleted(self, execute: Execute) -> None:
        """Remove the text of deleted rows from the index, inside the transaction that deleted them."""
        if not self._fts5_available():
            return
        exists = self._index_exists()
        for table in INDEXED_COLUMNS:
            _drop_former_index(execute, table)
            if not exists:
                continue
            execute(f"DELETE FROM {table}_words_index WHERE rowid NOT IN (SELECT id FROM {table})")
            # FTS5 keeps deleted words until the index is merged
            execute(f"INSERT INTO {table}_words_index({table}_words_index) VALUES ('optimize')")

    def _update_index(self) -> bool:
        """Index the rows that changed; return False if SQLite has no FTS5."""
        if not self._create_index():
            return False
        selects = (f"SELECT 1 FROM {table} WHERE NOT indexed" for table in INDEXED_COLUMNS)
        if self._database.read(f"{' UNION ALL '.join(selects)} LIMIT 1"):
            with self._database.write() as execute:
                for table, column in INDEXED_COLUMNS.items():
                    execute(
                        f"INSERT OR REPLACE INTO {table}_words_index(rowid, {column})"
                        f" SELECT id, words_apart(CAST({column} AS BLOB)) FROM {table} WHERE NOT indexed"
                    )
                    execute(f"UPDATE {table} SET indexed = 1 WHERE NOT indexed")
        return True

    def _create_index(self) -> bool:
        if not self._fts5_available():
            return False
        if not self._index_exists():
            with self._database.write() as execute:
                for table, column in INDEXED_COLUMNS.items():
                    _drop_former_index(execute, table)
                    execute(f"UPDATE {table} SET indexed = 0 WHERE indexed")
                    execute(
                        f"CREATE VIRTUAL TABLE IF NOT EXISTS {table}_words_index"
                        f" USING {MODULE}({column}, tokenize = 'unicode61 remove_diacritics 2')"
                    )
        return True

    def _fts5_available(self) -> bool:
        return bool(self._database.read("SELECT 1 FROM pragma_module_list WHERE name = ?", MODULE))

    def _index_exists(self) -> bool:
        return bool(self._database.read("SELECT 1 FROM sqlite_master WHERE name = 'nodes_words_index'"))


def _drop_former_index(execute: Execute, table: str) -> None:
    """Drop the index of versions that did not set words apart."""
    execute(f"DROP TABLE IF EXISTS {table}_index")


def words_apart(stored: bytes | None) -> str:
    """Return UTF-8 text with a separator between scripts without spaces and other words."""
    return _BORDER.sub(_SEPARATOR, _text(stored))


def _text(stored: bytes | None) -> str:
    """Return a column's text, as much of it as is UTF-8; a damaged row may hold anything."""
    return (stored or b"").decode(errors="replace")


def excerpt(stored: bytes | None, words: str) -> str | None:
    """Return one line of UTF-8 text around the first match; None unless it has all `words`, in any case."""
    text = _text(stored)
    folded = text.casefold()
    places = [folded.find(word) for word in words.casefold().split()]
    if min(places) < 0:
        return None
    start = max(0, min(places) - SNIPPET_CHARACTERS // 3)
    end = start + SNIPPET_CHARACTERS
    line = " ".join(text[start:end].split())
    return f"{'…' * (start > 0)}{line}{'…' * (end < len(text))}"


def _phrases(words: str) -> str:
    """Return an FTS5 query for all words, the last one as a prefix; quoted, so that no word is syntax."""
    quoted = ['"{}"'.format(word.replace('"', '""')) for word in words.split() if _has_words(word)]
    return f"{' '.join(quoted)}*"


def _has_words(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _has_unspaced_script(text: str) -> bool:
    """Tell whether `text` has letters of scripts such as Thai, Chinese and Japanese, all above U+0E00."""
    return any(ord(character) > 0x0E00 and unicodedata.category(character) == "Lo" for character in text)
