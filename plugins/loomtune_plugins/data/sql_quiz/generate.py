"""The task's rows: a question about a schema, the query that answers it, and a database to run it on."""

import random
import sqlite3
from collections.abc import Iterator, Mapping

from loomtune_plugins.data.sql_quiz.question import ask
from loomtune_plugins.data.sql_quiz.schema import Names, Schema, draw, script
from loomtune_plugins.data.sql_quiz.words import SPLITS, Words
from loomtune_plugins.data.sql_quiz.wrong import mistakes

_EVERY_WORD = frozenset().union(*(split.all() for split in SPLITS.values()))


def rows(split: str, count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """`count` rows of a split with keys `prompt`, `completion`, `database`, `schema` and `intent`.

    Row `i` is a pure function of (split, seed, i). Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    for index in range(count):
        yield _row(SPLITS[split], f"{split}-{seed}-{index}")


def order_matters(query: str) -> bool:
    """Whether the question asked for an order, so that results are compared as lists."""
    return " ORDER BY " in query


def wrong_queries(row: Mapping[str, str], rng: random.Random) -> Iterator[str]:
    """Plausible wrong queries for a row, in random order; each differs from the gold in one respect."""
    found = list(dict.fromkeys(mistakes(row["prompt"], row["completion"], row["database"])))
    yield from rng.sample(found, len(found))


def _row(words: Words, identifier: str) -> dict[str, str]:
    rng = random.Random(identifier)
    while True:
        row = _draft(words, identifier, rng)
        if _discriminates(row):
            return row


def _draft(words: Words, identifier: str, rng: random.Random) -> dict[str, str]:
    names = Names(rng.sample(words.tables, 2), rng.sample(words.texts, 4), rng.sample(words.numbers, 3))
    schema = draw(names, rng, _EVERY_WORD)
    intent, slots = ask(schema, rng)
    return {
        "prompt": prompt(schema, rng.choice(intent.questions).format_map(slots)),
        "completion": intent.sql.format_map(slots),
        "database": script(schema),
        "schema": identifier,
        "intent": intent.name,
    }


def prompt(schema: Schema, question: str) -> str:
    """The task's format; it ends in a newline, so that prompt and query never share a token."""
    shown = "; ".join(f"{table.name}({', '.join(column.name for column in table.columns)})" for table in schema.listed)
    return f"Tables: {shown}\nQuestion: {question}\nSQL:\n"


def _discriminates(row: Mapping[str, str]) -> bool:
    """Whether the gold query answers something, and no query with one mistake answers the same."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(row["database"])
        ordered = order_matters(row["completion"])
        gold = _answer(connection, row["completion"], ordered)
        wrong = mistakes(row["prompt"], row["completion"], row["database"])
        return bool(gold) and all(_answer(connection, query, ordered) != gold for query in wrong)
    finally:
        connection.close()


def _answer(connection: sqlite3.Connection, query: str, ordered: bool) -> list[str] | None:
    """The result as comparable text, None where the query does not run."""
    try:
        found = [repr(row) for row in connection.execute(query).fetchmany(100)]
    except sqlite3.Error:
        return None
    return found if ordered else sorted(found)
