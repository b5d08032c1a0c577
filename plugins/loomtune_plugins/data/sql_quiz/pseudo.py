"""Made-up words: values of every database, and the names of the pretraining schemas.

Names that are never the same twice are what teaches a small model to copy from its context instead of recalling.
"""

# ruff: noqa: SIM905 - lists of words read better as text than as literals

import random
import re
from string import ascii_lowercase

from loomtune_plugins.data.sql_quiz.intents import INTENTS
from loomtune_plugins.data.sql_quiz.words import SPLITS

_ONSETS = tuple("b c d f g h j k l m n p q r s t v w x y z br ch cl cr dr fl gr pl pr sc sh sk sl sp st th tr".split())
_VOWELS = tuple("a e i o u a e i o ai ea ee ie oa ou".split())
_CODAS = tuple("b c ck d ft g k l ll m n nd ng nt p r rd rk rn rt s ss st t x".split())
_HELD_OUT = SPLITS["validation"].all() | SPLITS["test"].all()
_KEYWORDS = frozenset(
    """abort action add after all alter always analyze and any asc attach before begin between both by cascade case cast
    check collate column commit conflict cross current database default deferred delete desc detach distinct drop each
    else end escape except exclude exists explain fail filter first following for foreign from full glob group having if
    ignore immediate in index indexed initially inner insert instead integer intersect into is isnull join key last left
    like limit match max min natural no not nothing notnull null nulls of offset on or order others outer over
    partition plan pragma preceding primary query raise range recursive references regexp reindex release rename replace
    returning right rollback row rows savepoint select set sum table temp temporary then ties to text trigger unbounded
    union unique update using vacuum values view virtual when where window with without""".split()
)
_PHRASED = frozenset(re.findall(r"[a-z]+", " ".join(text for i in INTENTS for text in (*i.questions, *i.comments))))
_NEVER = _HELD_OUT | _KEYWORDS | _PHRASED


def word(rng: random.Random, reserved: frozenset[str] = frozenset()) -> str:
    """A word of 3 to 10 letters that is in no held-out split, no word of SQL or of a phrasing, and not `reserved`."""
    while True:
        letters = _pronounceable(rng) if rng.random() < 0.6 else _spelled(rng)
        if 3 <= len(letters) <= 10 and letters not in _NEVER and letters not in reserved:
            return letters


def _pronounceable(rng: random.Random) -> str:
    """Syllables, half of the words closed by a consonant, some opened by a vowel."""
    letters = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2, 2, 3))))
    opening = rng.choice(_VOWELS) if rng.random() < 0.2 else ""
    return opening + letters + (rng.choice(_CODAS) if rng.random() < 0.5 else "")


def _spelled(rng: random.Random) -> str:
    """Any letters at all: real words hold pairs of letters that syllables never make."""
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(3, 8)))


def words(rng: random.Random, count: int, reserved: frozenset[str] = frozenset()) -> list[str]:
    """`count` different made-up words."""
    found: list[str] = []
    while len(found) < count:
        candidate = word(rng, reserved)
        if candidate not in found:
            found.append(candidate)
    return found
