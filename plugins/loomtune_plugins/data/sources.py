"""Which columns of a record mean what, and what rows are made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loomtune.errors import Fault, UserError, near
from loomtune_plugins.data import ordered
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.json_values import taken_out
from loomtune_plugins.data.turns import SHAREGPT
from loomtune_plugins.data.values import is_label, keys


@dataclass(frozen=True, slots=True)
class Source:
    """Columns from which rows of a format are made.

    keys: what the columns are to each other; each is the name of a setting. asks: what has to be set before `auto`
        takes this source, because other files use the word for something else; `turns`: answers that are
        conversations, and so say themselves what they answer.
    """

    format: str
    keys: tuple[str, ...]
    asks: str = ""

    @property
    def by_threshold(self) -> bool:
        """Whether labels may be made of numbers."""
        return self.format == "unpaired" and bool({"score", "scores"} & {*self.keys})

    @property
    def spoken(self) -> bool:
        """Whether prompts and answers may be conversations; what is learned of others says `messages`."""
        return bool({"chosen", "label", "score", "answers"} & {*self.keys})


SOURCES = (
    Source("messages", ("messages",)),
    Source("preference", ("prompt", "chosen", "rejected")),
    Source("preference", ("chosen", "rejected"), asks="turns"),
    Source("preference", ("prompt", "answers", "scores")),
    Source("preference", ("prompt", "answers", "ranks")),
    Source("preference", ("prompt", "answers"), asks="answers"),
    Source("unpaired", ("prompt", "completion", "label"), asks="label"),
    Source("unpaired", ("prompt", "completion", "score"), asks="threshold"),
    Source("unpaired", ("prompt", "answers", "scores"), asks="threshold"),
    Source("completion", ("prompt", "completion")),
    Source("text", ("text",)),
    Source("prompt", ("prompt",)),
    Source("unpaired", ("prompt", "answers", "ranks"), asks="format"),
    Source("unpaired", ("prompt", "answers"), asks="format"),
    Source("unpaired", ("prompt", "chosen", "rejected"), asks="format"),
    Source("unpaired", ("chosen", "rejected"), asks="turns"),
    Source("completion", ("prompt", "answers", "scores"), asks="format"),
    Source("completion", ("prompt", "answers", "ranks"), asks="format"),
    Source("completion", ("prompt", "answers"), asks="format"),
)
"""In the order in which `auto`, or a format of several sources, tries them."""

FORMATS = tuple(dict.fromkeys(source.format for source in SOURCES))
KEYS = tuple(dict.fromkeys(key for source in SOURCES for key in source.keys))


def choose(settings: FileSettings, record: Mapping[str, Any], where: str) -> tuple[Source, Mapping[str, str]]:
    """The source that settings and a first record ask for, with the column of each of its keys. Raises UserError."""
    named = {key: getattr(settings, key) for key in KEYS if getattr(settings, key)} or _sharegpt(settings, record)
    source = _source(settings, named, record, where)
    columns = {key: named.get(key, key) for key in source.keys}
    for key, column in columns.items():
        if not has(record, column):
            raise _missing(key, column, source, record, where)
    if unused := list(_unused(settings, source)):
        raise UserError(*unused)
    return source, columns


def named(format: str, columns: Collection[str]) -> Source:
    """The source of a format and its keys."""
    return next(source for source in SOURCES if (source.format, {*source.keys}) == (format, {*columns}))


def unprepared(settings: FileSettings, format: str, columns: Collection[str]) -> Iterator[Fault]:
    """What is set and would do nothing, because preparation leaves rankings and pairs as they are."""
    cure, lost = (
        "leave it out, and set it where a run reads them: data=prepared",
        "is heeded where a run reads the rows",
    )
    for key, usual in (("pairs", "all"), ("min_gap", 0.0)):
        if getattr(settings, key) != usual:
            yield Fault(f"data.{key}={getattr(settings, key)} {lost}", cure)
    if settings.threshold is not None and "scores" in columns:
        yield Fault(f"data.threshold={settings.threshold} {lost}", cure)
    if settings.format == format != "preference" and {"answers", "chosen"} & {*columns}:
        yield Fault(f"data.format={format}, which is made of several answers, {lost}", cure)


def has(record: Mapping[str, Any], column: str) -> bool:
    """Whether a record has a column, or for `list.field` the list."""
    return column in record or ("." in column and column.split(".", maxsplit=1)[0] in record)


def faults(settings: FileSettings) -> Iterator[Fault]:
    """Values that settings cannot have."""
    known = ("auto", *FORMATS)
    if settings.format not in known:
        what = f"data.format={settings.format} is not known.{near(settings.format, known)}"
        yield Fault(what, f"set data.format to one of {', '.join(known)}")
    yield from ordered.faults(settings)


def _source(settings: FileSettings, named: Mapping[str, str], record: Mapping[str, Any], where: str) -> Source:
    """The first that takes every named column and finds its others in the record, else the nearest."""
    takes = [source for source in SOURCES if settings.format in ("auto", source.format)]
    if settings.format != "auto":
        _refuse_strangers(named, takes, settings.format)
    begins = isinstance(record.get(named.get("chosen", "chosen")), list)
    takes = [source for source in takes if {*named} <= {*source.keys} and (begins or source.asks != "turns")]
    if settings.threshold is not None:
        takes = [source for source in takes if source.by_threshold] or takes
    if settings.format == "auto":
        takes = [source for source in takes if _may_be_guessed(source, settings, named, record)]
    lacking = {source: sum(not has(record, named.get(key, key)) for key in source.keys) for source in takes}
    if settings.threshold is not None and {*named} <= {"prompt"} and all(lacking.values()):
        return _source(replace(settings, threshold=None), named, record, where)  # which then is told as never used
    if takes and (named or settings.format != "auto" or not min(lacking.values())):
        return min(takes, key=lambda source: lacking[source])
    told = " and ".join(f"data.{key}={column}" for key, column in named.items())
    raise UserError.of(
        f"{where} has the columns {keys(record)}, of which no "
        f"{'format' if settings.format == 'auto' else settings.format} can be made{told and f' with {told}'}",
        _rows_within(record, where)
        or "name the columns, for instance data.prompt=question data.completion=answer (or data.messages=, data.text=)",
    )


def _sharegpt(settings: FileSettings, record: Mapping[str, Any]) -> Mapping[str, str]:
    """The conversation under ShareGPT's name, where nothing else is there of which rows can be made."""
    takes = [source for source in SOURCES if settings.format in ("auto", source.format)]
    if settings.format not in ("auto", "messages") or any({*source.keys} <= {*record} for source in takes):
        return {}
    return {"messages": SHAREGPT} if SHAREGPT in record else {}


def _may_be_guessed(source: Source, settings: FileSettings, named: Collection[str], record: Mapping[str, Any]) -> bool:
    """Whether `auto` may take it: a label where there is one to see, other words only where somebody set them."""
    if source.asks == "label":
        return "label" in named or is_label(record.get("label"))
    if source.asks == "turns":
        return source.format == "preference"
    if source.asks == "threshold":
        return settings.threshold is not None or "score" in named
    return not source.asks or source.asks in named


def _refuse_strangers(named: Mapping[str, str], takes: Collection[Source], chosen: str) -> None:
    """Raises UserError where a named column belongs to other formats only."""
    for key in sorted(named):
        if not any(key in source.keys for source in takes):
            others = dict.fromkeys(source.format for source in SOURCES if key in source.keys)
            raise UserError.of(
                f"data.{key}={named[key]} is never used, because the rows are read as format={chosen}",
                f"leave data.{key} out, or set data.format to one of {', '.join(others)}",
            )


def _unused(settings: FileSettings, source: Source) -> Iterator[Fault]:
    """What is set and does nothing with this source, and what it lacks."""
    several, cut = "answers" in source.keys, settings.threshold is not None
    lost = f"is never used, because rows of format={source.format} are made of {', '.join(source.keys)}"
    if "score" in source.keys and not cut:
        cure = "set data.threshold to the least score of a wanted answer"
        yield Fault("data.threshold is not set, which makes labels of scores", cure)
    if cut and not source.by_threshold:
        cure = "leave it out, or set data.format=unpaired and name data.score or data.scores"
        yield Fault(f"data.threshold={settings.threshold} {lost}", cure)
    if settings.pairs != "all" and not (several and source.format == "preference"):
        cure = "leave it out, or set data.format=preference and name data.answers"
        yield Fault(f"data.pairs={settings.pairs} {lost}", cure)
    if settings.min_gap and (not several or source.format == "completion" or cut):
        cure = "leave it out, or name data.answers" + ("" if not cut else " and leave out data.threshold")
        yield Fault(f"data.min_gap={settings.min_gap} {lost}", cure)


def _missing(key: str, column: str, source: Source, record: Mapping[str, Any], where: str) -> UserError:
    return UserError.of(
        f"{where} has no column '{column}' for the {key} of format={source.format}; it has "
        f"{keys(record)}.{near(column, record)}",
        _rows_within(record, where) or f"set data.{key}= to one of its columns",
    )


def _rows_within(record: Mapping[str, Any], where: str) -> str:
    """How to take them out, where a .json is one object with a list of objects that are not messages; else nothing."""
    path = Path(where.rpartition(":")[0])
    lists = [name for name, value in record.items() if isinstance(value, list) and any(map(_is_record, value))]
    if len(lists) != 1 or path.suffix.lower() != ".json":
        return ""
    return f"if its rows are the objects in its list '{lists[0]}', take them out: {taken_out(path, lists[0])}"


def _is_record(value: Any) -> bool:
    return isinstance(value, Mapping) and not {"role", "from"} & {*value}
