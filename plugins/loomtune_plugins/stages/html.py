"""Text that came from web pages. A few rules by hand, because parsers take `vector<int>` for a tag and lose it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape

INLINE = (
    "a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark nobr q rp rt ruby s samp"
    " small span strike strong sub sup time tt u var wbr"
)
BLOCK = (
    "address article aside blockquote body br button caption center col colgroup dd details div dl dt fieldset"
    " figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr html iframe input legend li link main meta nav"
    " noscript ol option p pre section select summary table tbody td textarea tfoot th thead title tr ul"
)
# Attributes have a `=`, or `a<b and c>d` would be a tag. No part of these can match in two ways, and none runs over
# another `<`: hostile text costs no more than its length.
_TAG = r"</?(?:{})(?:\s[^<>=]*=[^<>]*|\s)?/?>"
_INLINE = re.compile(_TAG.format("|".join(INLINE.split())), re.IGNORECASE)
_BLOCK = re.compile(rf"\n?{_TAG.format('|'.join(BLOCK.split()))}\n?", re.IGNORECASE)
_TICKS = re.compile(r"```|`")
_UNSEEN = (("<!--", "-->"), ("<script", "</script>"), ("<style", "</style>"))


def stripped(text: str) -> str:
    """Without tags, comments, scripts and styles; entities read. What stands in back-ticks stays as it is."""
    return "".join(part if is_code else _without_tags(part) for part, is_code in _parts(text))


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and which of them are code; back-ticks that are not closed open none."""
    start = place = 0
    unclosed = set[str]()
    while found := _TICKS.search(text, place):
        ticks, place = found.group(), found.end()
        end = -1 if ticks in unclosed else text.find(ticks, place)
        if end < 0:
            unclosed.add(ticks)
            continue
        yield text[start : found.start()], False
        start = place = end + len(ticks)
        yield text[found.start() : start], True
    yield text[start:], False


def _without_tags(text: str) -> str:
    for opening, closing in _UNSEEN:
        text = _without(text, opening, closing)
    return unescape(_INLINE.sub("", _BLOCK.sub("\n", text)))


def _without(text: str, opening: str, closing: str) -> str:
    lower, kept, place = text.lower(), [], 0
    while (start := lower.find(opening, place)) >= 0 and (end := lower.find(closing, start)) >= 0:
        kept.append(text[place:start])
        place = end + len(closing)
    return "".join([*kept, text[place:]])
