"""Plausible wrong queries: the gold query with one thing mistaken."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_TABLE = re.compile(r"(\w+)\(([^)]*)\)")
_TOKEN = re.compile(r"'\w+'|\w+|[^\w\s]")
_AGGREGATES = ("MAX", "MIN", "SUM", "AVG")
_CALL = re.compile(rf"({'|'.join(_AGGREGATES)})\((\w+)\)")

_CLAUSES = (
    ("order", " DESC"),
    ("limit", " LIMIT 1"),
    ("distinct", "DISTINCT "),
    ("order", " ORDER BY [^ ]+( DESC)?"),
    ("condition", " WHERE .*"),
    ("condition", " AND .*"),
)
"""What may be forgotten: the kind of that mistake, and the words that go."""


class Mistake(NamedTuple):
    """A query, and what is wrong with it: `column`, `comparison`, ..."""

    kind: str
    query: str


def tables_of(prompt: str) -> dict[str, list[str]]:
    """Each table of the prompt's first line with its columns."""
    return {name: columns.split(", ") for name, columns in _TABLE.findall(prompt.split("\n", 1)[0])}


def mistakes(prompt: str, gold: str, database: str) -> Iterator[Mistake]:
    """Every query that differs from `gold` in one column, table, function, comparison, order or value.

    The generator draws only databases on which each of them answers something else.
    """
    tables = tables_of(prompt)
    columns = list(dict.fromkeys(column for listed in tables.values() for column in listed))
    values = list(dict.fromkeys(re.findall(r"'\w+'", database)))
    for match in _TOKEN.finditer(gold):
        for kind, other in _others(match.group(), tables, columns, values):
            yield Mistake(kind, gold[: match.start()] + other + gold[match.end() :])
    yield from _reshaped(gold)


def further(prompt: str, gold: str, database: str) -> Iterator[Mistake]:
    """Queries with larger mistakes. Whether they answer something else is to be seen by running them."""
    columns = [column for listed in tables_of(prompt).values() for column in listed]
    if threshold := re.search(r"(?<=[<>] )\d+", gold):
        numbers = dict.fromkeys(re.findall(r"\b\d+\b", database))
        yield from (Mistake("number", gold[: threshold.start()] + x + gold[threshold.end() :]) for x in numbers)
    if "COUNT(" in gold:
        counted = r"COUNT\([^)]*\)"
        yield from (Mistake("aggregate", re.sub(counted, f"SUM({column})", gold)) for column in columns)
    yield from (Mistake("aggregate", _CALL.sub(instead, gold)) for instead in (r"\2", "COUNT(*)") if _CALL.search(gold))
    yield from _regrouped(gold, columns)
    yield from _misspelt(gold, list(dict.fromkeys((*tables_of(prompt), *columns))))
    if both := re.search(r"WHERE (.*) AND (.*)", gold):
        yield Mistake("condition", gold[: both.start()] + f"WHERE {both[2]}")
        yield Mistake("condition", gold.replace(" AND ", " OR "))
    if " JOIN " in gold:
        yield Mistake("join", re.sub(r" JOIN \w+ USING \(\w+\)", "", gold))
        yield Mistake("join", re.sub(r"FROM \w+ JOIN (\w+) USING \(\w+\)", r"FROM \1", gold))


def _others(token: str, tables: dict[str, list[str]], columns: list[str], values: list[str]) -> Iterator[Mistake]:
    """What could stand, mistakenly, in the place of `token`."""
    for kind, known in (("column", columns), ("table", list(tables)), ("aggregate", _AGGREGATES), ("value", values)):
        if token in known:
            yield from (Mistake(kind, other) for other in known if other != token)
            return
    if token in "<>":
        yield Mistake("comparison", "<" if token == ">" else ">")


def _reshaped(gold: str) -> Iterator[Mistake]:
    """The gold query with a clause lost or gained."""
    for kind, clause in _CLAUSES:
        lost = re.sub(clause, "", gold)
        if lost != gold:
            yield Mistake(kind, lost)
    if " ORDER BY " in gold and " DESC" not in gold:
        yield Mistake("order", re.sub(r"( ORDER BY \w+)", r"\1 DESC", gold))


def _regrouped(gold: str, columns: list[str]) -> Iterator[Mistake]:
    """A total where each group's was asked for, or the other way round."""
    if " GROUP BY " in gold:
        alone = re.sub(r" GROUP BY \w+", "", gold)
        yield Mistake("group", re.sub(r"SELECT \w+, ", "SELECT ", alone))
        yield Mistake("group", alone)
    elif re.match(r"SELECT \w+\(", gold) and " WHERE " not in gold:
        yield from (Mistake("group", f"SELECT {c}, {gold.removeprefix('SELECT ')} GROUP BY {c}") for c in columns)


def _misspelt(gold: str, names: list[str]) -> Iterator[Mistake]:
    """A name or a value of which only the beginning is right: it ends there, or as another name does.

    What small models do with words that they have never met.
    """
    for match in re.finditer(r"\w+", gold):
        word, middle = match.group(), (len(match.group()) + 1) // 2
        quoted = gold[: match.start()].endswith("'")
        for end in ("", *(name[len(name) // 2 :] for name in names)) if quoted or word in names else ():
            yield Mistake("spelling", gold[: match.start()] + word[:middle] + end + gold[match.end() :])
