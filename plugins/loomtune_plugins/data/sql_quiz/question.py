"""Filling an intent's slots from a schema."""

import random
from collections.abc import Mapping

from loomtune_plugins.data.sql_quiz.intents import INTENTS, Intent
from loomtune_plugins.data.sql_quiz.schema import Column, Schema, Table


def ask(schema: Schema, rng: random.Random) -> tuple[Intent, Mapping[str, str]]:
    """An intent that the schema can answer, with the words for its slots."""
    while True:
        intent, table = rng.choice(INTENTS), rng.choice(schema.listed)
        if "l" in intent.slots:
            return intent, _join(schema, rng)
        if "c" not in intent.slots or table.of_kind("label"):
            return intent, _single(table, intent, rng)


def _single(table: Table, intent: Intent, rng: random.Random) -> dict[str, str]:
    number, key = rng.choice(table.of_kind("number")), table.of_kind("key")[0]
    filled = {"t": table.name, "k": key.name, "n": number.name, "m": number.name, "x": _threshold(number, rng)}
    labels = table.of_kind("label")
    if labels:
        label = rng.choice(labels)
        filled |= {"c": label.name, "v": str(rng.choice(label.values))}
    if intent.name == "value_where" and rng.random() < 0.5:
        filled |= {"c": key.name, "v": str(rng.choice(key.values))}
    return filled


def _join(schema: Schema, rng: random.Random) -> dict[str, str]:
    parent, child = schema.parent, schema.child
    number, key = rng.choice(parent.of_kind("number")), child.of_kind("key")[0]
    return {
        "t": parent.name,
        "u": child.name,
        "l": parent.of_kind("key")[0].name,
        "c": key.name,
        "v": str(rng.choice(key.values)),
        "n": number.name,
        "m": number.name,
        "x": _threshold(number, rng),
    }


def _threshold(column: Column, rng: random.Random) -> str:
    """A number that leaves at least two rows on each side and, where there is room, is no value itself."""
    ordered = sorted(int(value) for value in column.values)
    place = rng.randrange(2, len(ordered) - 1)
    low, high = ordered[place - 1], ordered[place]
    return str(rng.randrange(low + 1, high)) if high - low > 1 else str(low)
