"""Where rows come from."""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

Row = Mapping[str, Any]
"""One example, in one schema whatever the file was:

- `{"prompt": str, "completion": str}`; only the completion is learned;
- `{"messages": [{"role": ..., "content": ...}, ...]}`; only the assistant's turns are learned; `tools` beside them;
- `{"text": str}`; every token is learned;
- `{"prompt": ..., "chosen": ..., "rejected": ...}` for preferences; `label` beside a completion: whether it is wanted;
- `{"prompt": ...}` alone, for reinforcement learning.

Rows that are prepared and not yet read for an objective may also be `{"prompt": ..., "answers": [...]}` with `ranks` or
`scores` of the answers. Other keys ride along for evaluators (a database, a gold answer). `origin` says where the row
was read (`file:line`), `source` of which source it is where data mix several.
"""

SAID = ("messages", "prompt", "completion", "chosen", "rejected", "answers", "text")
"""The keys of a row that hold what people or models said: text, a conversation, or a list of either."""

BESIDE = ("tools", "label", "ranks", "scores", "margin")
"""The keys of a row that are learned from beside what was said."""

Piece = Mapping[str, Any]
"""Which part of a split: plain data that JSON holds, so that another process may read it."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that goes no further.

    reason: a few words, the same for all such records, by which they are counted. detail: what is about this one.
    row: what there was of it; large or unreadable content is left out.
    """

    origin: str
    reason: str
    detail: str = ""
    row: Row = field(default_factory=dict)


class Data(ABC):
    """A source of rows with named splits. Used before any process group exists: importing it must not import torch.

    mixes: True where each row says by `source` of which of several sources it is; those of one follow each other.
    window: how many training rows are read and tokenised at a time, while the run goes on; 0: all, before it begins.
    """

    mixes: bool = False
    window: int = 0

    @abstractmethod
    def check(self) -> None:
        """Raises UserError at once where files are missing, empty or unreadable."""

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Which of `train`, `validation` and `test` there are."""

    @abstractmethod
    def rows(self, split: str) -> Iterable[Row]:
        """The rows of a split, always in the same order. Raises UserError, after the last, where any record is bad."""

    def check_pieces(self) -> None:
        """What preparation asks in the place of `check`: a bad record refuses nothing there."""
        self.check()

    def pieces(self, split: str) -> Sequence[Piece]:
        """Parts of a split that can be read apart, in its order; those of files are some megabytes each."""
        return [{"split": split}]

    def read(self, piece: Piece) -> Iterable[Row | Dropped]:
        """A part's rows as preparation keeps them, and in the place of each bad record what is wrong with it."""
        return self.rows(piece["split"])

    def stream(self, place: Any = None) -> Iterator[tuple[Row | Dropped, Any]]:
        """Training rows from a place on (None: the first), each with the place behind it, plain data that JSON holds.

        In the place of a bad record stands what is wrong with it. Asked only where there is a `window`; the data, the
        objective and the tokenizer are then sent to another process, so they can be pickled.
        """
        start = int(place or 0)
        yield from ((row, n) for n, row in enumerate(itertools.islice(self.rows("train"), start, None), start + 1))

    def inputs(self, split: str) -> Mapping[str, str]:
        """What a split is read from, by the names that `origin` has, with a digest of each; empty: of nothing."""
        return {}

    def left_out(self, split: str) -> Sequence[str]:
        """What of a split, when it was last read, gave no row, and a cure, in words for the user; empty: nothing."""
        return ()

    def visits(self, rows: Mapping[str, int]) -> Mapping[str, Fraction]:
        """How often an epoch visits each source. rows: how many `train` has of each; as many, unless the data mix.

        A run asks for it; a share that is no whole number comes out even over several epochs.
        """
        return {name: Fraction(count) for name, count in rows.items()}

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of everything that the rows depend on: the files' contents, the mapping of columns, seeds."""


def identity(row: Row) -> bytes:
    """Everything that is learned of a row, as bytes: equal where two rows teach the same, roles and labels included."""
    learned = {key: row[key] for key in (*SAID, *BESIDE) if row.get(key) is not None}
    text = json.dumps(learned, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def sides(row: Row) -> tuple[str, str]:
    """(what was asked, what was answered): all that the assistant did not say, and all that it did or might have."""
    asked: list[str] = []
    answered: list[str] = []
    for key in SAID:
        for role, said in _turns(row.get(key), "user" if key == "prompt" else "assistant"):
            (answered if role == "assistant" else asked).append(said)
    return "\n".join(asked), "\n".join(answered)


def retold(row: Row, change: Callable[[str], str]) -> dict[str, Any]:
    """The row with everything that was said in it changed; roles, labels and what rides along stay as they are."""
    return {**row, **{key: _retold(row[key], change) for key in SAID if key in row}}


def _turns(said: Any, speaker: str) -> Iterator[tuple[str, str]]:
    """(role, words) of a text, a conversation, or a list of either; a call of a tool in its JSON."""
    if isinstance(said, str):
        yield speaker, said
    elif isinstance(said, Mapping):
        calls = said.get("tool_calls")
        called = [json.dumps(calls, sort_keys=True, ensure_ascii=False)] if calls else []
        yield str(said.get("role", speaker)), "\n".join([*filter(None, [said.get("content")]), *called])
    elif isinstance(said, Sequence):
        for part in said:
            yield from _turns(part, speaker)


def _retold(said: Any, change: Callable[[str], str]) -> Any:
    if isinstance(said, str):
        return change(said)
    if isinstance(said, Mapping):
        return {**said, **({"content": _retold(said["content"], change)} if "content" in said else {})}
    return [_retold(part, change) for part in said] if isinstance(said, Sequence) else said
