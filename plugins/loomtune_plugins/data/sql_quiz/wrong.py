"""Plausible wrong queries: the gold query with one thing mistaken."""

import re
from collections.abc import Iterator

_TABLE = re.compile(r"(\w+)\(([^)]*)\)")
_TOKEN = re.compile(r"'\w+'|\w+|[^\w\s]")
_AGGREGATES = ("MAX", "MIN", "SUM", "AVG")


def tables_of(prompt: str) -> dict[str, list[str]]:
    """Each table of the prompt's first line with its columns."""
    return {name: columns.split(", ") for name, columns in _TABLE.findall(prompt.split("\n", 1)[0])}


def mistakes(prompt: str, gold: str, database: str) -> Iterator[str]:
    """Every query that differs from `gold` in one column, table, function, comparison, order or value."""
    tables = tables_of(prompt)
    columns = list(dict.fromkeys(column for listed in tables.values() for column in listed))
    values = list(dict.fromkeys(re.findall(r"'\w+'", database)))
    for match in _TOKEN.finditer(gold):
        for other in _others(match.group(), tables, columns, values):
            yield gold[: match.start()] + other + gold[match.end() :]
    yield from _reshaped(gold)


def _others(token: str, tables: dict[str, list[str]], columns: list[str], values: list[str]) -> list[str]:
    """What could stand, mistakenly, in the place of `token`."""
    if token in columns:
        return [column for column in columns if column != token]
    if token in tables:
        return [table for table in tables if table != token]
    if token in _AGGREGATES:
        return [function for function in _AGGREGATES if function != token]
    if token.startswith("'"):
        return [value for value in values if value != token]
    if token in "<>":
        return ["<" if token == ">" else ">"]
    return []


def _reshaped(gold: str) -> Iterator[str]:
    """The gold query with a clause lost or gained."""
    for clause in (" DESC", " LIMIT 1", "DISTINCT ", " ORDER BY [^ ]+( DESC)?", " WHERE .*", " AND .*"):
        lost = re.sub(clause, "", gold)
        if lost != gold:
            yield lost
    if " ORDER BY " in gold and " DESC" not in gold:
        yield re.sub(r"( ORDER BY \w+)", r"\1 DESC", gold)
