"""What rows are compared by: what was asked, the answers one by one, and what must not differ at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from loomtune.contracts import Row
from loomtune.contracts.data import BESIDE, SAID, sides
from loomtune.errors import UserError

SYSTEM = ("system", "developer")
RIVALS = ("chosen", "rejected")
NUMBER = re.compile("[\\d\u00b2\u00b3\u00b9\u2070-\u2079\u2080-\u2089]+")
"""Digits of any script, raised and lowered ones too."""


def asked(row: Row) -> str:
    """What was asked, without system prompts: many rows share one, and it would make all of them alike."""
    return sides({key: _unprompted(row[key]) for key in SAID if key in row})[0]


def answers(row: Row) -> list[str]:
    """The answers of a row, in the order that says which is better; a conversation's turns are one answer."""
    said: list[Row] = [{key: row[key]} for key in RIVALS if key in row]
    if "answers" in row:
        said += [{"answers": [answer]} for answer in row["answers"]]
    return [sides(one)[1] for one in said] or [sides(row)[1]]


def fixed(row: Row, *also: Any) -> int:
    """Digest of what makes rows differ whatever their words: labels, ranks, scores, tools, system prompts; else 0.

    also: more that does, as plain data.
    """
    values: dict[str, Any] = {key: row[key] for key in BESIDE if row.get(key) is not None}
    values |= {key: system for key in SAID if (system := _prompts(row.get(key)))}
    values |= {f"also {place}": value for place, value in enumerate(also) if value}
    return digest(json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)) if values else 0


def beside(row: Row, columns: Sequence[str], key: str) -> list[Any]:
    """What a row has in the columns that a setting, `key`, names. Raises UserError where it has no such column."""
    if missing := [column for column in columns if column not in row]:
        what = f"{row.get('origin', 'a row')} has no column {', '.join(missing)}; it has {', '.join(sorted(row))}"
        raise UserError.of(what, f"set {key} to columns of all rows, or leave it out")
    return [row[column] for column in columns]


def numbers(text: str) -> list[str]:
    """The numbers of a text in their order, digit by digit as they stand."""
    return NUMBER.findall(text)


def digest(text: str) -> int:
    """64 bits of a text, never 0."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


def _is_system(said: Any) -> bool:
    return isinstance(said, Mapping) and said.get("role") in SYSTEM


def _unprompted(said: Any) -> Any:
    return [one for one in said if not _is_system(one)] if isinstance(said, list | tuple) else said


def _prompts(said: Any) -> Sequence[Any]:
    return [one for one in said if _is_system(one)] if isinstance(said, list | tuple) else []
