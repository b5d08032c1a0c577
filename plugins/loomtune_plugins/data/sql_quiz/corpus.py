"""The base model's pretraining text: SQL scripts and word lists, never the task's own format.

The grammar of the queries is the task's, as any base model that has read code knows SQL; the names are mostly made up
afresh for every text, the rest come from the training words. No word of a validation or test schema occurs.
"""

import random
from collections.abc import Callable, Iterator

from loomtune_plugins.data.sql_quiz.pseudo import words
from loomtune_plugins.data.sql_quiz.question import ask
from loomtune_plugins.data.sql_quiz.schema import Names, Schema, Table, create, draw, insert
from loomtune_plugins.data.sql_quiz.words import SPLITS

_TRAIN = SPLITS["train"]


def texts(count: int, seed: int) -> Iterator[str]:
    """`count` texts of 60 to 250 tokens; text `i` is a pure function of (seed, i)."""
    for index in range(count):
        rng = random.Random(f"corpus-{seed}-{index}")
        kind = rng.choices(_KINDS, weights=_WEIGHTS)[0]
        yield kind(rng)


def _names(rng: random.Random) -> Names:
    """Names for a schema, three times in four made up."""
    if rng.random() < 0.25:
        tables, texts, numbers = _TRAIN.tables, _TRAIN.texts, _TRAIN.numbers
        return Names(rng.sample(tables, 2), rng.sample(texts, 4), rng.sample(numbers, 3))
    made = words(rng, 9)
    return Names(made[:2], made[2:6], made[6:])


def _schema(rng: random.Random) -> Schema:
    names = _names(rng)
    return draw(names, rng, frozenset((*names.tables, *names.texts, *names.numbers)))


def _script(rng: random.Random) -> str:
    """A commented SQL script: tables, sometimes a few rows, then described queries."""
    schema = _schema(rng)
    lines = [create(table) for table in schema.listed]
    if rng.random() < 0.25:
        lines.append(insert(rng.choice(schema.listed), 2))
    for _ in range(rng.randint(4, 7)):
        lines.extend(_described(schema, rng))
    return "\n".join(lines)


def _described(schema: Schema, rng: random.Random) -> tuple[str, str]:
    intent, slots = ask(schema, rng)
    return f"-- {rng.choice(intent.comments).format_map(slots)}", f"{intent.sql.format_map(slots)};"


def _dump(rng: random.Random) -> str:
    """A table's definition, its rows one by one, and a query for each of some columns."""
    table = rng.choice(_schema(rng).listed)
    columns = [column.name for column in table.columns]
    lines = [create(table)]
    lines += [f"SELECT {name} FROM {table.name};" for name in rng.sample(columns, 2)]
    lines.append(insert(table, 2) if rng.random() < 0.5 else _filled(table, rng))
    lines.append(f"SELECT {', '.join(rng.sample(columns, len(columns)))} FROM {table.name};")
    return "\n".join(lines)


def _filled(table: Table, rng: random.Random) -> str:
    """An `INSERT` that names its columns, in any order."""
    columns = rng.sample(table.columns, len(table.columns))
    values = (str(value) if isinstance(value := column.values[0], int) else f"'{value}'" for column in columns)
    return f"INSERT INTO {table.name} ({', '.join(c.name for c in columns)}) VALUES ({', '.join(values)});"


def _echo(rng: random.Random) -> str:
    """The same list several times."""
    line = ", ".join(words(rng, rng.randint(4, 9)))
    return "\n".join([line] * rng.randint(2, 3))


def _shuffled(rng: random.Random) -> str:
    """A list, then the same words in other orders."""
    listed = words(rng, rng.randint(4, 8))
    return "\n".join(", ".join(rng.sample(listed, len(listed))) for _ in range(rng.randint(2, 4)))


def _pairs(rng: random.Random) -> str:
    """Keys with values, then the values looked up again."""
    keys = words(rng, 10)
    pairs = [f"{key} = '{value}'" for key, value in zip(keys[:5], keys[5:], strict=True)]
    return f"{', '.join(pairs)}\n{', '.join(rng.sample(pairs, len(pairs)))}"


_KINDS: tuple[Callable[[random.Random], str], ...] = (_script, _dump, _echo, _shuffled, _pairs)
_WEIGHTS = (60, 10, 10, 10, 10)
