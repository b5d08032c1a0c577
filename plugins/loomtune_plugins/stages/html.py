"""Text that came from web pages. A few rules by hand, because parsers take `vector<int>` for a tag and lose it."""

from __future__ import annotations

import re
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
_CODE = re.compile(r"(```[\s\S]*?```|`[^`\n]+`)")
_UNSEEN = [
    (re.compile(opening, re.IGNORECASE), re.compile(closing, re.IGNORECASE))
    for opening, closing in (("<!--", "-->"), (r"<script\b", "</script>"), (r"<style\b", "</style>"))
]


def stripped(text: str) -> str:
    """Without tags, comments, scripts and styles; entities read. What stands in back-ticks stays as it is."""
    parts = _CODE.split(text)
    return "".join(part if place % 2 else _without_tags(part) for place, part in enumerate(parts))


def _without_tags(text: str) -> str:
    for opening, closing in _UNSEEN:
        text = _without(text, opening, closing)
    return unescape(_INLINE.sub("", _BLOCK.sub("\n", text)))


def _without(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> str:
    kept, place = [], 0
    while (start := opening.search(text, place)) and (end := closing.search(text, start.end())):
        kept.append(text[place : start.start()])
        place = end.end()
    return "".join([*kept, text[place:]])
