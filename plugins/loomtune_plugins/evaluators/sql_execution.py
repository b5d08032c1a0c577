"""Whether two queries answer the same on a database, without trusting either of them."""

import sqlite3
import time
from collections import Counter
from collections.abc import Callable

MAX_ROWS = 1000
_STEPS_PER_CHECK = 1000
_ALLOWED = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION))
_Row = tuple[object, ...]


def executes_same(database: str, predicted: str, gold: str, *, ordered: bool, seconds: float = 1.0) -> bool:
    """Whether `predicted` returns on `database` (an SQL script) what `gold` returns; a query that fails does not.

    Rows compare as a list where `ordered`, else as a multiset; numbers compare to 9 digits; column names do not count.
    Each query may only read tables and has `seconds` and 1,000 rows. Raises ValueError where `gold` itself fails.
    """
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(database)
        connection.set_authorizer(_read_only)
        expected = _rows(connection, gold, seconds)
        if expected is None:
            raise ValueError(f"the gold query does not run on its database: {gold!r}")
        found = _rows(connection, predicted, seconds)
    finally:
        connection.close()
    if found is None:
        return False
    return found == expected if ordered else Counter(found) == Counter(expected)


def _rows(connection: sqlite3.Connection, query: str, seconds: float) -> list[_Row] | None:
    """The query's rows, None where it fails, takes too long or returns too much."""
    connection.set_progress_handler(_deadline(seconds), _STEPS_PER_CHECK)
    try:
        rows = connection.execute(query).fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError, UnicodeError):
        return None
    return [_comparable(row) for row in rows] if len(rows) <= MAX_ROWS else None


def _deadline(seconds: float) -> Callable[[], int]:
    """SQLite's progress handler: anything but 0 interrupts the query."""
    end = time.monotonic() + seconds
    return lambda: int(time.monotonic() > end)


def _read_only(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    """SQLite's authorizer: tables of the script may be read, nothing else; the catalogue would give schemas away."""
    if action == sqlite3.SQLITE_READ:
        return sqlite3.SQLITE_DENY if (first or "").startswith("sqlite_") else sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in ("load_extension", "randomblob", "zeroblob"):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _comparable(row: _Row) -> _Row:
    return tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row)
