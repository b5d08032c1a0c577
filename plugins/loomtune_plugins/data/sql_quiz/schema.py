"""A schema of two related tables, and rows that tell its queries apart."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loomtune_plugins.data.sql_quiz.pseudo import words

Kind = Literal["key", "label", "link", "number"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column with its values: `key` unique text, `label` repeated text, `link` the other table's key."""

    name: str
    kind: Kind
    values: tuple[str | int, ...]

    @property
    def type(self) -> str:
        """The SQLite type."""
        return "INTEGER" if self.kind == "number" else "TEXT"


@dataclass(frozen=True, slots=True)
class Table:
    """A table, column by column; every column has as many values as the table has rows."""

    name: str
    columns: tuple[Column, ...]

    def of_kind(self, kind: Kind) -> list[Column]:
        """The columns of one kind, in their order."""
        return [column for column in self.columns if column.kind == kind]


@dataclass(frozen=True, slots=True)
class Schema:
    """Two tables: `child` holds the key of `parent`. `listed` is the order in which they are shown."""

    parent: Table
    child: Table
    listed: tuple[Table, Table]


@dataclass(frozen=True, slots=True)
class Names:
    """The words that a schema may use; shuffled copies, consumed from the end."""

    tables: list[str]
    texts: list[str]
    numbers: list[str]


def draw(names: Names, rng: random.Random, reserved: frozenset[str]) -> Schema:
    """A schema with fresh values. Labels repeat, keys and numbers do not, so results differ wherever queries do."""
    parent_rows, child_rows = rng.sample(range(6, 15), 2)
    pool = words(rng, parent_rows + child_rows + 8, reserved)
    key = Column(names.texts.pop(), "key", _take(pool, parent_rows))
    parent = [key, _label(names, pool, parent_rows, rng), *_numbers(names, parent_rows, rng, rng.choice((1, 2)))]
    link = Column(key.name, "link", tuple(rng.choice(key.values) for _ in range(child_rows)))
    child = [Column(names.texts.pop(), "key", _take(pool, child_rows)), link, *_numbers(names, child_rows, rng, 1)]
    if rng.random() < 0.4:
        child.append(_label(names, pool, child_rows, rng))
    first, second = _table(names, parent, rng), _table(names, child, rng)
    return Schema(first, second, (first, second) if rng.random() < 0.5 else (second, first))


def script(schema: Schema) -> str:
    """The SQL that creates and fills the database."""
    return "\n".join(line for table in schema.listed for line in (create(table), insert(table)))


def create(table: Table) -> str:
    """The table's `CREATE TABLE` statement."""
    return f"CREATE TABLE {table.name} ({', '.join(f'{column.name} {column.type}' for column in table.columns)});"


def insert(table: Table, limit: int | None = None) -> str:
    """One `INSERT` statement with the table's first `limit` rows."""
    rows = list(zip(*(column.values for column in table.columns), strict=True))[:limit]
    return f"INSERT INTO {table.name} VALUES {', '.join(_tuple(row) for row in rows)};"


def _tuple(row: Sequence[str | int]) -> str:
    shown = (str(value) if isinstance(value, int) else f"'{value}'" for value in row)
    return f"({', '.join(shown)})"


def _take(pool: list[str], count: int) -> tuple[str, ...]:
    return tuple(pool.pop() for _ in range(count))


def _label(names: Names, pool: list[str], rows: int, rng: random.Random) -> Column:
    """A text column of two to four values, each at least once and unevenly often."""
    distinct = _take(pool, rng.choice((2, 3, 3, 4)))
    values = [*distinct, *rng.choices(distinct, weights=range(1, len(distinct) + 1), k=rows - len(distinct))]
    return Column(names.texts.pop(), "label", tuple(rng.sample(values, rows)))


def _numbers(names: Names, rows: int, rng: random.Random, count: int) -> list[Column]:
    return [Column(names.numbers.pop(), "number", tuple(rng.sample(range(10, 1000), rows))) for _ in range(count)]


def _table(names: Names, columns: list[Column], rng: random.Random) -> Table:
    return Table(names.tables.pop(), tuple(rng.sample(columns, len(columns))))
