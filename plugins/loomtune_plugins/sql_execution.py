"""Whether two queries answer the same on a database, without trusting either of them."""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

MAX_ROWS = 1000
_STEPS_PER_CHECK = 100
_LONGEST = 1_000_000
"""Bytes of a value that a query makes: a text repeated to a gigabyte is an error, not a full memory."""

_MOST = 16 << 20
"""Characters and bytes of all rows of a query, lest a thousand of the longest fill the memory together."""

_ALLOWED = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION))
_DENIED = ("load_extension", "fts3_tokenizer", "randomblob", "zeroblob")
_FENCED = re.compile(r"```(?:sql|sqlite)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
Rows = list[tuple[object, ...]]


class Database:
    """The tables of an SQL script, in memory. Queries only read them, so any number of them may come, in any order."""

    def __init__(self, script: str, seconds: float = 1.0) -> None:
        self._seconds = seconds
        self._connection = sqlite3.connect(":memory:")
        try:
            self._connection.executescript(script)
        except BaseException:
            self.close()
            raise
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000)
        self._connection.set_authorizer(_read_only)

    def rows(self, query: str) -> Rows | None:
        """The query's rows, None where it fails, takes too long or returns too much; values compare to 9 digits."""
        self._connection.set_progress_handler(_deadline(self._seconds), _STEPS_PER_CHECK)
        try:
            with closing(self._connection.execute(query)) as cursor:
                rows = _fetched(cursor) if cursor.description else None
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError, UnicodeError):
            return None
        return None if rows is None else [_comparable(row) for row in rows]

    def close(self) -> None:
        """Lets go of its memory."""
        self._connection.close()


def _fetched(cursor: sqlite3.Cursor) -> Rows | None:
    """All rows, None where they are too many or too long."""
    rows, size = Rows(), 0
    for row in cursor:
        rows.append(row)
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        if len(rows) > MAX_ROWS or size > _MOST:
            return None
    return rows


def executes_same(database: str, predicted: str, gold: str, *, ordered: bool, seconds: float = 1.0) -> bool:
    """Whether `predicted` returns on `database` (an SQL script) what `gold` returns; a query that fails does not.

    Rows compare as a list where `ordered`, else as a multiset; numbers compare to 9 digits; column names do not count.
    Each query may only read tables and has `seconds` and 1,000 rows. Raises ValueError where `gold` itself fails.
    """
    tables = Database(database, seconds)
    try:
        expected = tables.rows(gold)
        if expected is None:
            raise ValueError(f"the gold query does not run on its database: {gold!r}")
        found = tables.rows(predicted)
    finally:
        tables.close()
    return found is not None and equal(found, expected, ordered=ordered)


def equal(found: Rows, expected: Rows, *, ordered: bool) -> bool:
    """Whether two queries returned the same, in the same order where it counts."""
    return found == expected if ordered else Counter(found) == Counter(expected)


def right_query(row: Mapping[str, Any]) -> str | None:
    """The right query of a row: what it says is right, the preferred answer of a pair, or the completion."""
    found = row.get("gold", row.get("chosen", row.get("completion")))
    return None if found is None else str(found)


def is_ordered(query: str) -> bool:
    """Whether a right query asks for an order, which then counts."""
    return " ORDER BY " in f" {' '.join(query.upper().split())} "


def written_query(text: str) -> str:
    """The query of an answer: the last that is fenced by backticks, else all of it."""
    fenced = _FENCED.findall(text) if "```" in text else []
    return str(fenced[-1] if fenced else text).strip()


def _deadline(seconds: float) -> Callable[[], int]:
    """SQLite's progress handler: anything but 0 interrupts the query."""
    end = time.monotonic() + seconds
    return lambda: int(time.monotonic() > end)


def _read_only(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    """SQLite's authorizer: tables of the script may be read, nothing else; the catalogue would give schemas away."""
    if action == sqlite3.SQLITE_READ:
        return sqlite3.SQLITE_DENY if (first or "").startswith("sqlite_") else sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _DENIED:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _comparable(row: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row)
