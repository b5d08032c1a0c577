"""What stages answer about rows, and whether it is an answer: nothing that a plugin does loses a row without a word."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from loomtune.contracts import Dropped, Row, RowStage
from loomtune.contracts.data import SAID
from loomtune.errors import Fault, LoomtuneError, RunFailed
from loomtune_plugins.commands.prepare.parts import line_of


def judged(name: str, stage: RowStage, lines: Sequence[bytes]) -> list[tuple[Row | Dropped, bytes]]:
    """For each line the stage's answer, and its line where it stays. Raises RunFailed where that is no answer.

    The stage gets rows of its own: what it does to them in their place changes nothing that is known here.
    """
    rows: list[Row] = [json.loads(line) for line in lines]
    origins = [row.get("origin") for row in rows]
    answers = asked(name, lines, stage.apply, rows)
    return [(one, _line(name, origin, one)) for origin, one in zip(origins, answers, strict=True)]


def asked(name: str, lines: Sequence[bytes], ask: Callable[[Sequence[Row]], Any], rows: Sequence[Row]) -> Any:
    """A stage's answer about some rows. Raises RunFailed, naming the row, where it fails or answers for fewer.

    lines: what the rows were before the stage saw them.
    """
    try:
        return _answers(ask, rows)
    except LoomtuneError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any manner
        culprit = next(_failing(ask, lines), "")
        where = culprit or f"{json.loads(lines[0]).get('origin')} or one of {len(lines) - 1} rows after it"
        raise _failed(name, f"failed at {where}: {type(error).__name__}: {error}") from error


def _failing(ask: Callable[[Sequence[Row]], Any], lines: Sequence[bytes]) -> Iterator[str]:
    for line in lines:
        try:
            _answers(ask, [json.loads(line)])
        except (Exception, SystemExit):
            yield str(json.loads(line).get("origin", "a row"))


def _answers(ask: Callable[[Sequence[Row]], Any], rows: Sequence[Row]) -> Any:
    count, answers = len(rows), ask(rows)
    if not hasattr(answers, "__len__") or isinstance(answers, Mapping | str | bytes):
        raise TypeError(f"gave {_kind(answers)} and no list of answers")
    if len(answers) != count:
        raise ValueError(f"gave {len(answers)} answers about {count} rows")
    return answers


def _line(name: str, origin: Any, answer: Any) -> bytes:
    if isinstance(answer, Dropped):
        if not answer.reason or not isinstance(answer.reason, str):
            raise _failed(name, f"dropped {origin} without a reason")
        if (answer.origin or None) != (origin or None):
            raise _failed(name, f"dropped {origin} as {answer.origin!r}: a dropped row keeps its origin")
        return b""
    if not isinstance(answer, Mapping):
        raise _failed(name, f"gave {_kind(answer)} for {origin}, which is neither a row nor Dropped")
    if answer.get("origin") != origin:
        raise _failed(name, f"gave a row for {origin} whose origin is {answer.get('origin')!r}: a row keeps its own")
    if all(answer.get(key) is None for key in SAID):
        raise _failed(name, f"gave a row for {origin} in which nothing is said: it has none of {', '.join(SAID)}")
    try:
        return line_of(answer)
    except RunFailed as error:
        raise _failed(name, f"gave what is not kept: {error}") from error


def _kind(answer: Any) -> str:
    return "None" if answer is None else f"a {type(answer).__name__}"


def _failed(name: str, what: str) -> RunFailed:
    return RunFailed(
        str(Fault(f"stage={name} {what}", f"tell the author of {name}, leave it out, or take that row away"))
    )
