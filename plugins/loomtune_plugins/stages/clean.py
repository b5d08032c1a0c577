"""Rows as they should have been written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import unescape
from importlib.metadata import version
from typing import Any

from loomtune.contracts import Dropped, Row, RowStage
from loomtune.contracts.data import SAID, retold, sides
from loomtune.errors import UserError
from loomtune_plugins.stages.html import stripped
from loomtune_plugins.stages.said import answers
from loomtune_plugins.stages.settings import CleanSettings

FORMS: Mapping[str, Callable[[str], str]] = {
    "none": str,
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
}
HTML: Mapping[str, Callable[[str], str]] = {"keep": str, "unescape": unescape, "strip": stripped}

UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
"""NUL, which ends texts elsewhere, and halves of surrogate pairs, which no file in UTF-8 holds."""

BREAKS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
"""Where a line or a page ends: what stands on both sides does not belong together."""

_UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f]"
"""Thai, Lao, Myanmar and Khmer, which put U+200B where a line may break between words."""

UNSEEN = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f"  # kept: flags of regions, spelt in tags
    f"|(?<={_UNSPACED})\u200b(?={_UNSPACED}))"
    r"|\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)"  # colours and titles of terminals (ECMA-48)
    "|[\x01-\x08\x0b-\x1f\x7f-\x9f"  # control characters; tab and newline stay
    "\u200b\u2060\ufeff\ufff9-\ufffb\ufffe\uffff"  # zero-width blanks, byte-order marks; scripts and emoji need joiners
    "\U000e0000-\U000e007f]"  # tags: text that models read and nobody sees
)


class Clean(RowStage):
    """Mends the text of each row, and drops rows that are too short, too long or have nothing to learn."""

    def __init__(self, settings: CleanSettings) -> None:
        _check(settings)
        self._settings = settings

    def versions(self) -> Mapping[str, str]:
        unicode = {"unicode": unicodedata.unidata_version}
        return {**unicode, "ftfy": version("ftfy")} if self._settings.mojibake else unicode

    def apply(self, rows: Sequence[Row]) -> Sequence[Row | Dropped]:
        return [self._judged(retold(row, self._mended)) for row in rows]

    def _mended(self, text: str) -> str:
        settings = self._settings
        text = HTML[settings.html](UNWRITABLE.sub("", text))
        if settings.mojibake:
            text = _fixed()(text)
        if settings.control:
            text = UNSEEN.sub(lambda found: found[1] or "", BREAKS.sub("\n", text))
        text = FORMS[settings.unicode](text)
        return collapsed(text) if settings.blanks == "collapse" else text

    def _judged(self, row: dict[str, Any]) -> Row | Dropped:
        """Roles, labels and whatever rides along stay as they are; a row that may stay is given back whole."""
        reason, detail = self._fault(row)
        return Dropped(str(row.get("origin", "")), reason, detail, row) if reason else row

    def _fault(self, row: Row) -> tuple[str, str]:
        settings = self._settings
        characters = sum(len(side.strip()) for side in sides(row))
        if characters < settings.min_characters:
            return "too short", f"{characters} characters"
        if settings.max_characters and characters > settings.max_characters:
            return "too long", f"{characters} characters"
        if "messages" in row and not any(turn.get("role") == "assistant" for turn in row["messages"]):
            return "no turn of the assistant", ""
        return self._answer_fault(row) if row.keys() & {*SAID} - {"prompt"} else ("", "")

    def _answer_fault(self, row: Row) -> tuple[str, str]:
        settings = self._settings
        lengths = [len(answer.strip()) for answer in answers(row)]
        if min(lengths, default=0) < settings.min_answer:
            few = min(lengths, default=0)
            return ("answer too short", f"{few} characters") if few else ("no answer", "")
        if settings.max_answer and max(lengths) > settings.max_answer:
            return "answer too long", f"{max(lengths)} characters"
        if "rejected" in row and row.get("chosen") == row["rejected"]:
            return "both answers are the same", ""
        return "", ""


def collapsed(text: str) -> str:
    """One blank between words, no blanks at the ends of lines, one empty line at most; indentation stays."""
    lines: list[str] = []
    for line in text.split("\n"):
        body = line.strip()
        lines.append(line[: len(line) - len(line.lstrip())] + " ".join(body.split()) if body else "")
    kept = [line for place, line in enumerate(lines) if line or (place and lines[place - 1])]
    return "\n".join(kept).strip("\n")


@cache
def _fixed() -> Callable[[str], str]:
    from ftfy import fix_encoding

    return fix_encoding


def _check(settings: CleanSettings) -> None:
    known = {"unicode": FORMS, "html": HTML, "blanks": ("keep", "collapse")}
    for key, values in known.items():
        if (value := getattr(settings, key)) not in values:
            cure = "set " + " or ".join(f"stage.clean.{key}={name}" for name in values)
            raise UserError.of(f"stage.clean.{key}={value} is unknown", cure)
    for what in ("characters", "answer"):
        least, most = getattr(settings, f"min_{what}"), getattr(settings, f"max_{what}")
        if least < 0 or (most and most < least):
            told = f"stage.clean.min_{what}={least} and stage.clean.max_{what}={most} leave no row"
            raise UserError.of(told, f"set stage.clean.min_{what} to 0 or more, and at most stage.clean.max_{what}")
