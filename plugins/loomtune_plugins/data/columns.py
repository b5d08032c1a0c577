"""From a file's record to rows in the one schema that objectives read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from loomtune.contracts import Piece
from loomtune.errors import UserError
from loomtune_plugins.data.files import Files
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.ordered import Answer, extremes, pairs, preference, tiers
from loomtune_plugins.data.reader import Reader
from loomtune_plugins.data.sources import KEYS, Source, choose, faults, has, named, unprepared
from loomtune_plugins.data.turns import SHAREGPT, apart, conversation, spoken
from loomtune_plugins.data.values import RecordError, keys, kind, label, listed, number, text

ROW = ("messages", "prompt", "chosen", "rejected", "completion", "label", "text")
"""What rows have of their own; a record's other columns ride along."""

_READ: dict[str, Callable[[Any, str], Any]] = {
    "messages": conversation,
    "label": label,
    "score": number,
    "answers": listed,
    "ranks": listed,
    "scores": listed,
    "text": text,
}
"""How a column is read; those of the others may hold conversations, depending on the format."""


CURE = "mend these records, or leave them out of the file"


class ColumnFiles(Files):
    """Files whose columns settings map."""

    settings: FileSettings

    def __init__(
        self, settings: FileSettings, reader: Reader, cure: str = CURE, patterns: Mapping[str, str] | None = None
    ) -> None:
        decide, make = partial(Columns.decided, settings), partial(Columns.of, settings)
        super().__init__(settings, reader, decide, make, faults(settings), cure, patterns=patterns)

    def pieces(self, split: str) -> Sequence[Piece]:
        """Of its files. Raises UserError where something is set that only a run could heed."""
        found = super().pieces(split)
        for piece in found[0]["pieces"] if self.settings.limit else found:
            if piece["chosen"] and (lost := list(unprepared(self.settings, **piece["chosen"]))):
                raise UserError(*lost)
        return found


@dataclass(frozen=True)
class Columns:
    """How the records of a file become rows. columns: key of the source to the column that fills it."""

    settings: FileSettings
    source: Source
    columns: Mapping[str, str]

    @classmethod
    def of(cls, settings: FileSettings, chosen: Mapping[str, Any]) -> Columns:
        """chosen: as `decided` of a file's first record."""
        return cls(settings, named(chosen["format"], chosen["columns"]), chosen["columns"])

    @staticmethod
    def decided(settings: FileSettings, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The format, and the column of each of its keys. Raises UserError where one is not there."""
        source, columns = choose(settings, record, where)
        return {"format": source.format, "columns": dict(columns)}

    def of_record(self, record: Mapping[str, Any], origin: str) -> tuple[Any, list[dict[str, Any]]]:
        """(what tells it from others, its rows). Raises RecordError.

        Rows of one prompt are told from others by that prompt, so that none of them is in another split.
        """
        values = self._values(record)
        rows = [{**made, **_beside(record, made), "origin": origin} for made in self._made(values)]
        return {"prompt": values["prompt"]} if self._is_of_many else learned(rows[0]), rows

    def canonical(self, record: Mapping[str, Any], origin: str) -> list[dict[str, Any]]:
        """One row, whose columns bear their own keys: of what was mapped, nothing rides along a second time."""
        values = self._values(record)
        if "answers" in values:
            answers = _answers(values, self.columns)
            values["answers"] = [spoken(said, "an answer") for said in values["answers"]]
            if len(values) == 2:
                values["ranks"] = list(range(1, len(answers) + 1))
        if "score" in values and self.settings.threshold is not None:
            values["label"] = values["score"] >= self.settings.threshold
        riding = {key: value for key, value in record.items() if key not in self._mapped}
        if "label" in record and "label" not in self.columns.values():
            riding["label"] = record["label"]
        return [{**riding, **values, "origin": origin}]

    @cached_property
    def _mapped(self) -> frozenset[str]:
        """Columns of a record that its row has under their own keys, or that would be taken for such."""
        roots = (column.split(".")[0] for column in self.columns.values())
        return frozenset((*KEYS, SHAREGPT, *self.columns.values(), *roots))

    def _values(self, record: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: self._value(record, key, column) for key, column in self.columns.items()}
        return apart(**values) if "chosen" in values and "prompt" not in values else values

    @property
    def _is_of_many(self) -> bool:
        return "answers" in self.columns or (self.source.format == "unpaired" and "chosen" in self.columns)

    def _made(self, values: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        """What the source's columns give, without those that ride along."""
        asked = {"prompt": values.get("prompt")}
        if self.source.format == "unpaired" and "label" not in values:
            return [{**asked, "completion": said, "label": wanted} for said, wanted in self._labelled(values)]
        if "answers" not in values:
            return [values]
        answers = _answers(values, self.columns)
        if self.source.format == "preference":
            return [{**asked, **preference(*pair)} for pair in pairs(answers, self.settings)]
        return [_answered(values["prompt"], best.said) for best, *_ in tiers(answers)[:1]]

    def _labelled(self, values: Mapping[str, Any]) -> Iterator[tuple[Any, bool]]:
        """Answers with whether they are wanted: by the threshold, else the better and the worse, or best and worst."""
        threshold = self.settings.threshold
        if "chosen" in values:
            yield from ((values["chosen"], True), (values["rejected"], False))
        elif "score" in values:
            yield values["completion"], values["score"] >= threshold
        elif threshold is None:
            yield from ((a.said, wanted) for a, wanted in extremes(_answers(values, self.columns), self.settings))
        else:
            yield from ((answer.said, answer.worth >= threshold) for answer in _answers(values, self.columns))

    def _value(self, record: Mapping[str, Any], key: str, column: str) -> Any:
        read = _READ.get(key) or (spoken if self.source.spoken else text)
        return read(_cell(record, column), f"'{column}'")


def _beside(record: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that ride along. A margin of the file's own is the one that somebody meant."""
    own = {*ROW} - ({"label"} - {*made})
    return {column: value for column, value in record.items() if column not in own}


def learned(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says; what a hash of its content goes by. Both labels of one answer are the same content."""
    return {key: row[key] for key in ROW if key in row and key != "label"}


def _cell(record: Mapping[str, Any], column: str) -> Any:
    """A record's value; of `list.field`, that field of each object in the list. Raises RecordError."""
    if not has(record, column):
        raise RecordError(f"has no column '{column}'; it has {keys(record)}", "no column")
    if column in record:
        return record[column]
    name, field = column.split(".", 1)
    entries = enumerate(listed(record[name], f"'{name}'"), start=1)
    return [_field(entry, field, f"'{name}' entry {count}") for count, entry in entries]


def _field(entry: Any, field: str, where: str) -> Any:
    if not isinstance(entry, Mapping):
        raise RecordError(f"{where} is {kind(entry)}, not an object")
    if field not in entry:
        raise RecordError(f"{where} has no '{field}'; it has {keys(entry)}", "no column")
    return entry[field]


def _answers(values: Mapping[str, Any], columns: Mapping[str, str]) -> list[Answer]:
    """The answers with what they are worth, without those that nobody ranked. Raises RecordError."""
    numbered = enumerate(values["answers"], start=1)
    said = [spoken(value, f"'{columns['answers']}' answer {count}") for count, value in numbered]
    by = next((key for key in ("ranks", "scores") if key in values), None)
    if by is None:
        return [Answer(answer, -float(place)) for place, answer in enumerate(said)]
    if len(values[by]) != len(said):
        raise RecordError(f"'{columns[by]}' has {len(values[by])} numbers for {len(said)} answers")
    sign = -1.0 if by == "ranks" else 1.0
    given = zip(said, values[by], strict=True)
    return [Answer(answer, sign * number(worth, f"'{columns[by]}'")) for answer, worth in given if worth is not None]


def _answered(prompt: Any, answer: Any) -> dict[str, Any]:
    """A row that learns the answer: a conversation where either of them is one."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return {"prompt": prompt, "completion": answer}
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return {"messages": said if said[: len(before)] == before else [*before, *said]}
