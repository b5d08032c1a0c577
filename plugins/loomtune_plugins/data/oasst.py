"""OpenAssistant's conversation trees, in which people ranked the replies to each message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loomtune.contracts import Piece
from loomtune.errors import Fault, UserError, near
from loomtune_plugins.data import ordered
from loomtune_plugins.data.files import Files, undecided
from loomtune_plugins.data.jsonl import JsonLines
from loomtune_plugins.data.limits import Limits
from loomtune_plugins.data.oasst_settings import FORMATS, OasstSettings
from loomtune_plugins.data.ordered import extremes, pairs, preference
from loomtune_plugins.data.reader import Record
from loomtune_plugins.data.tree import Message, asked, best_path, read_tree

HEEDED = {"pairs": ("all",), "min_gap": (0.0,), "format": ("preference", "messages", "prompt")}
"""What preparation leaves to the run that reads the rows, and with which values it has nothing to do."""

CURE = "give an export of whole trees (`..._trees.jsonl.gz`), and mend these lines or leave them out"
BARREN = "give trees in which somebody ranked replies, in the language of data.lang, or set a lower data.min_gap"


class Oasst(Files):
    """The export of trees, one a line (Köpf et al. 2023, "OpenAssistant Conversations"); `.gz` is read as it is.

    Messages marked deleted, synthetic or rejected by review are left out, with all that was said under them. Rows of a
    tree are never in two splits.
    """

    settings: OasstSettings

    def __init__(self, settings: OasstSettings) -> None:
        reader = JsonLines(Limits.of(settings))
        super().__init__(settings, reader, undecided, self._itself, _faults(settings), CURE, BARREN)

    def _itself(self, _chosen: Mapping[str, Any]) -> Oasst:
        return self

    def pieces(self, split: str) -> Sequence[Piece]:
        """Of its files. Raises UserError where something is set that only a run could heed."""
        if lost := [name for name, usual in HEEDED.items() if getattr(self.settings, name) not in usual]:
            told = " and ".join(f"data.{name}={getattr(self.settings, name)}" for name in lost)
            cure = "leave it out, and set it where a run reads them: data=prepared"
            raise UserError.of(f"{told} is heeded where a run reads the rows", cure)
        return super().pieces(split)

    def canonical(self, record: Record, origin: str) -> list[dict[str, Any]]:
        """What was asked, with the ranked replies; for other formats, as objectives read them."""
        if self.settings.format != "preference":
            return self.of_record(record, origin)[1]
        root = read_tree(record, self.settings.lang)
        beside = {"tree": record.get("message_tree_id"), "origin": origin}
        return [
            {
                "prompt": path,
                "answers": [answer.said for answer in message.ranked],
                "ranks": [-answer.worth for answer in message.ranked],
                **beside,
            }
            for path, message in (asked(root) if root else ())
            if len(message.ranked) > 1
        ]

    def of_record(self, record: Record, origin: str) -> tuple[Any, list[dict[str, Any]]]:
        """(the tree's first words, its rows). Raises RecordError."""
        root = read_tree(record, self.settings.lang)
        if root is None:
            return None, []
        beside = {"tree": record.get("message_tree_id"), "origin": origin}
        return root.said, [{**row, **beside} for row in self._made(root)]

    def _made(self, root: Message) -> Iterator[dict[str, Any]]:
        if self.settings.format == "messages":
            path = best_path(root)
            yield from [{"messages": path}] if path else []
            return
        for path, message in asked(root):
            if self.settings.format == "prompt":
                yield {"messages": path}
            elif self.settings.format == "unpaired":
                for answer, wanted in extremes(message.ranked, self.settings):
                    yield {"prompt": path, "completion": answer.said, "label": wanted}
            else:
                yield from ({"prompt": path, **preference(*pair)} for pair in pairs(message.ranked, self.settings))


def _faults(settings: OasstSettings) -> Iterator[Fault]:
    if settings.format not in FORMATS:
        what = f"data.format={settings.format} is not known.{near(settings.format, FORMATS)}"
        yield Fault(what, f"set data.format to one of {', '.join(FORMATS)}")
    yield from ordered.faults(settings)
    lost = f"is never used, because rows are of format={settings.format}"
    if settings.pairs != "all" and settings.format != "preference":
        yield Fault(f"data.pairs={settings.pairs} {lost}", "leave it out, or set data.format=preference")
    if settings.min_gap and settings.format not in ("preference", "unpaired"):
        yield Fault(f"data.min_gap={settings.min_gap} {lost}", "leave it out, or set data.format=preference")
