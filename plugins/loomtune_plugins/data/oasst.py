"""OpenAssistant's conversation trees, in which people ranked the replies to each message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loomtune.errors import Fault, near
from loomtune_plugins.data import ordered
from loomtune_plugins.data.files import Files, Record
from loomtune_plugins.data.jsonl import read
from loomtune_plugins.data.oasst_settings import FORMATS, OasstSettings
from loomtune_plugins.data.ordered import extremes, pairs, preference
from loomtune_plugins.data.tree import Message, asked, best_path, read_tree

CURE = "give an export of whole trees (`..._trees.jsonl.gz`), and mend these lines or leave them out"
BARREN = "give trees in which somebody ranked replies, in the language of data.lang, or set a lower data.min_gap"


class Oasst(Files):
    """The export of trees, one a line (Köpf et al. 2023, "OpenAssistant Conversations"); `.gz` is read as it is.

    Messages marked deleted, synthetic or rejected by review are left out, with all that was said under them. Rows of a
    tree are never in two splits.
    """

    settings: OasstSettings

    def __init__(self, settings: OasstSettings) -> None:
        super().__init__(settings, read, lambda _record, _where: self, _faults(settings), CURE, BARREN)

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
