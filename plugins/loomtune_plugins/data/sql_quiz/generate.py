"""The task's rows: a question about a schema, the query that answers it, and a database to run it on."""

import itertools
import random
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing

from loomtune_plugins.data.sql_quiz import pseudo
from loomtune_plugins.data.sql_quiz.question import ask
from loomtune_plugins.data.sql_quiz.schema import Names, Schema, draw, script
from loomtune_plugins.data.sql_quiz.words import SPLITS, Words
from loomtune_plugins.data.sql_quiz.wrong import Mistake, further, mistakes

Values = tuple[object, ...]

_EVERY_WORD = frozenset().union(*(split.all() for split in SPLITS.values()))


def rows(split: str, count: int, seed: int = 0, invented: float = 0.0) -> Iterator[dict[str, str]]:
    """`count` rows of a split with keys `prompt`, `completion`, `database`, `schema` and `intent`.

    invented: share of rows whose schema has made-up names instead of the split's words. Row `i` is a pure function of
    (split, seed, i, invented). Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    for index in range(count):
        identifier = f"{split}-{seed}-{index}"
        made_up = bool(invented) and random.Random(f"{identifier}-invented").random() < invented
        yield _row(None if made_up else SPLITS[split], identifier)


def order_matters(query: str) -> bool:
    """Whether the question asked for an order, so that results are compared as lists."""
    return " ORDER BY " in query


def wrong_queries(row: Mapping[str, str], rng: random.Random, first: Collection[str] = ()) -> Iterator[Mistake]:
    """Plausible wrong queries for a row, each of them run: it fails, or returns something else than the gold query.

    In random order, a query of every kind of mistake before a second of any, so that the many ways to name a wrong
    column or value do not crowd out the one way to forget a condition. first: kinds that come before the others.
    """
    given = row["prompt"], row["completion"], row["database"]
    kinds: dict[str, list[Mistake]] = {}
    different: dict[str, Mistake] = {}
    for mistake in (*mistakes(*given), *further(*given)):
        if different.setdefault(mistake.query, mistake) is mistake:
            kinds.setdefault(mistake.kind, []).append(mistake)
    order = sorted(rng.sample(list(kinds), len(kinds)), key=lambda kind: kind not in first)
    shuffled = [rng.sample(kinds[kind], len(kinds[kind])) for kind in order]
    ordered = order_matters(row["completion"])
    with closing(_database(row)) as connection:
        gold = _answer(connection, row["completion"], ordered, _by_number)
        for mistake in (one for together in itertools.zip_longest(*shuffled) for one in together if one):
            if _answer(connection, mistake.query, ordered, _by_number) != gold:
                yield mistake


def _row(words: Words | None, identifier: str) -> dict[str, str]:
    rng = random.Random(identifier)
    while True:
        row = _draft(words, identifier, rng)
        if _discriminates(row):
            return row


def _draft(words: Words | None, identifier: str, rng: random.Random) -> dict[str, str]:
    """words: what names are drawn from; None: they are made up."""
    made_up = pseudo.words(rng, 9, _EVERY_WORD) if words is None else []
    names = Names(made_up[:2], made_up[2:6], made_up[6:])
    if words is not None:
        names = Names(rng.sample(words.tables, 2), rng.sample(words.texts, 4), rng.sample(words.numbers, 3))
    schema = draw(names, rng, _EVERY_WORD.union(made_up))
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
    with closing(_database(row)) as connection:
        ordered = order_matters(row["completion"])
        gold = _answer(connection, row["completion"], ordered)
        wrong = mistakes(row["prompt"], row["completion"], row["database"])
        return bool(gold) and all(_answer(connection, mistake.query, ordered) != gold for mistake in wrong)


def _database(row: Mapping[str, str]) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.executescript(row["database"])
    return connection


def _answer(
    connection: sqlite3.Connection, query: str, ordered: bool, shown: Callable[[Values], str] = repr
) -> list[str] | None:
    """The result as comparable text, None where the query does not run."""
    try:
        found = [shown(row) for row in connection.execute(query).fetchmany(100)]
    except sqlite3.Error:
        return None
    return found if ordered else sorted(found)


def _by_number(row: Values) -> str:
    """A row in which 5 and 5.0 look alike: whoever compares results takes an average of one for the number itself."""
    return repr([float(f"{value:.9g}") if isinstance(value, int | float) else value for value in row])
