"""What may be asked: each intent is one query template with the ways to ask for it.

`questions` are the task's phrasings; `comments` are how the same query is described in the pretraining text. Slots:
`{t}` a table, `{k}` the text column that is wanted, `{c}` the text column that filters or groups, `{v}` one of its
values, `{n}` and `{m}` number columns, `{x}` a threshold for `{m}`; in a join `{u}` is the other table, `{l}` the
column that both share, and `{c}` a column of `{u}`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Intent:
    """A query template with its phrasings; `name` is its id in the data."""

    name: str
    sql: str
    questions: tuple[str, ...]
    comments: tuple[str, ...]

    @property
    def slots(self) -> frozenset[str]:
        """The slots that the query fills, without the table that every query has."""
        return frozenset(slot for slot in "kcvnmxul" if f"{{{slot}}}" in self.sql)


def _aggregate(name: str, function: str, words: tuple[str, ...]) -> tuple[Intent, ...]:
    """The three intents of an aggregate: over a table, over some of its rows, and per group."""
    first, second = words
    over = Intent(
        name,
        f"SELECT {function}({{n}}) FROM {{t}}",
        (
            f"What is the {first} {{n}} of {{t}}?",
            f"Give me the {second} {{n}} in {{t}}.",
            f"Tell me the {first} {{n}}.",
        ),
        (f"{second} {{n}} in {{t}}", f"{first} {{n}} over all rows"),
    )
    some = Intent(
        f"{name}_where",
        f"SELECT {function}({{n}}) FROM {{t}} WHERE {{c}} = '{{v}}'",
        (
            f"What is the {first} {{n}} in {{t}} where {{c}} is {{v}}?",
            f"For {{c}} {{v}}, give me the {second} {{n}} in {{t}}.",
            f"What is the {first} {{n}} where {{c}} is {{v}}?",
        ),
        (f"{second} {{n}} in {{t}} with {{c}} {{v}}", f"{first} {{n}} with {{c}} {{v}}"),
    )
    group = Intent(
        f"{name}_group",
        f"SELECT {{c}}, {function}({{n}}) FROM {{t}} GROUP BY {{c}}",
        (
            f"What is the {first} {{n}} in {{t}} for each {{c}}?",
            f"Per {{c}}, give me the {second} {{n}} in {{t}}.",
            f"What is the {first} {{n}} for each {{c}}?",
        ),
        (f"{second} {{n}} by {{c}}", f"{first} {{n}} of every {{c}}"),
    )
    return over, some, group


_ROWS = (
    Intent(
        "list_where",
        "SELECT {k} FROM {t} WHERE {c} = '{v}'",
        (
            "Which {k} in {t} has {c} {v}?",
            "List the {k} from {t} where {c} is {v}.",
            "Find every {k} whose {c} is {v}.",
        ),
        ("{k} from {t} with {c} {v}", "{k} with {c} {v}"),
    ),
    Intent(
        "value_where",
        "SELECT {n} FROM {t} WHERE {c} = '{v}'",
        (
            "What {n} do we have in {t} for {c} {v}?",
            "Show the {n} from {t} where {c} is {v}.",
            "How much {n} has {c} {v}?",
        ),
        ("{n} from {t} with {c} {v}", "{n} with {c} {v}"),
    ),
    Intent(
        "list_above",
        "SELECT {k} FROM {t} WHERE {m} > {x}",
        (
            "Which {k} in {t} has {m} above {x}?",
            "List the {k} from {t} with more than {x} {m}.",
            "Show each {k} whose {m} exceeds {x}.",
        ),
        ("{k} from {t} where {m} is greater than {x}", "{k} over {x} {m}"),
    ),
    Intent(
        "list_below",
        "SELECT {k} FROM {t} WHERE {m} < {x}",
        (
            "Which {k} in {t} has {m} below {x}?",
            "List the {k} from {t} with less than {x} {m}.",
            "Show each {k} whose {m} is under {x}.",
        ),
        ("{k} from {t} where {m} is smaller than {x}", "{k} up to {x} {m}"),
    ),
    Intent(
        "list_both",
        "SELECT {k} FROM {t} WHERE {c} = '{v}' AND {m} > {x}",
        (
            "Which {k} in {t} has {c} {v} and {m} above {x}?",
            "List the {k} where {c} is {v} and {m} exceeds {x}.",
        ),
        ("{k} from {t} with {c} {v} and {m} greater than {x}", "{k} with {c} {v} over {x} {m}"),
    ),
    Intent(
        "distinct",
        "SELECT DISTINCT {c} FROM {t}",
        (
            "What different {c} are there in {t}?",
            "List each {c} from {t} once.",
            "Show the {c} without repeats.",
        ),
        ("unique {c} from {t}", "every {c}, no duplicates"),
    ),
)

_COUNTS = (
    Intent(
        "count",
        "SELECT COUNT(*) FROM {t}",
        ("How many {t} are there?", "Count every {t}.", "How many rows has {t}?"),
        ("number of rows in {t}", "count over {t}"),
    ),
    Intent(
        "count_where",
        "SELECT COUNT(*) FROM {t} WHERE {c} = '{v}'",
        ("How many {t} have {c} {v}?", "Count every {t} where {c} is {v}."),
        ("number of rows in {t} with {c} {v}",),
    ),
    Intent(
        "count_above",
        "SELECT COUNT(*) FROM {t} WHERE {m} > {x}",
        ("How many {t} have {m} above {x}?", "Count every {t} with more than {x} {m}."),
        ("number of rows in {t} where {m} is greater than {x}",),
    ),
    Intent(
        "count_below",
        "SELECT COUNT(*) FROM {t} WHERE {m} < {x}",
        ("How many {t} have {m} below {x}?", "Count every {t} with less than {x} {m}."),
        ("number of rows in {t} where {m} is smaller than {x}",),
    ),
    Intent(
        "count_distinct",
        "SELECT COUNT(DISTINCT {c}) FROM {t}",
        (
            "How many different {c} are there in {t}?",
            "Count each {c} from {t} once.",
            "Count each {c} once.",
        ),
        ("number of unique {c} in {t}", "number of unique {c}"),
    ),
    Intent(
        "count_group",
        "SELECT {c}, COUNT(*) FROM {t} GROUP BY {c}",
        ("How many {t} are there for each {c}?", "Per {c}, count every {t}."),
        ("number of rows in {t} by {c}",),
    ),
)

_ORDERED = (
    Intent(
        "top",
        "SELECT {k} FROM {t} ORDER BY {m} DESC LIMIT 1",
        (
            "Which {k} in {t} has the most {m}?",
            "Find the {k} from {t} with the highest {m}.",
            "Find the {k} with the highest {m}.",
        ),
        ("{k} from {t} with the largest {m}", "first {k} by {m}"),
    ),
    Intent(
        "bottom",
        "SELECT {k} FROM {t} ORDER BY {m} LIMIT 1",
        (
            "Which {k} in {t} has the least {m}?",
            "Find the {k} from {t} with the lowest {m}.",
            "Find the {k} with the lowest {m}.",
        ),
        ("{k} from {t} with the smallest {m}", "last {k} by {m}"),
    ),
    Intent(
        "rising",
        "SELECT {k} FROM {t} ORDER BY {m}",
        (
            "List the {k} from {t} by rising {m}.",
            "Show each {k} in {t}, lowest {m} first.",
            "Show each {k}, lowest {m} first.",
        ),
        ("{k} from {t} in ascending order of {m}", "{k} ascending by {m}"),
    ),
    Intent(
        "falling",
        "SELECT {k} FROM {t} ORDER BY {m} DESC",
        (
            "List the {k} from {t} by falling {m}.",
            "Show each {k} in {t}, highest {m} first.",
            "Show each {k}, highest {m} first.",
        ),
        ("{k} from {t} in descending order of {m}", "{k} descending by {m}"),
    ),
)

_JOINS = (
    Intent(
        "join_value",
        "SELECT {n} FROM {t} JOIN {u} USING ({l}) WHERE {c} = '{v}'",
        ("What {n} has the {t} of {c} {v}?", "Show the {t} {n} for {u} {c} {v}."),
        ("{n} from {t} joined to {u} with {c} {v}", "{n} joined to {c} {v}"),
    ),
    Intent(
        "join_above",
        "SELECT {c} FROM {u} JOIN {t} USING ({l}) WHERE {m} > {x}",
        ("Which {c} belongs to a {t} with {m} above {x}?", "List the {u} {c} where the {t} has more than {x} {m}."),
        ("{c} from {u} joined to {t} where {m} is greater than {x}", "{c} joined to {m} over {x}"),
    ),
)

INTENTS: tuple[Intent, ...] = (
    *_ROWS,
    *_COUNTS,
    *_aggregate("highest", "MAX", ("highest", "largest")),
    *_aggregate("lowest", "MIN", ("lowest", "smallest")),
    *_aggregate("total", "SUM", ("total", "sum of")),
    *_aggregate("average", "AVG", ("average", "mean")),
    *_ORDERED,
    *_JOINS,
)
