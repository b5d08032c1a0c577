"""From several answers to one prompt, in an order of worth, to the pairs or labels that objectives read.

An order of K answers holds up to K (K - 1) / 2 preferences (Ouyang et al. 2022, "InstructGPT", section 3.5). Answers of
equal worth are not compared, nor is one with the same words as another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loomtune.errors import Fault, near
from loomtune_plugins.data.split_settings import OrderSettings

PAIRS = ("all", "adjacent", "best_worst")


@dataclass(frozen=True, slots=True)
class Answer:
    """Text or messages, and a number that is the larger the better they are."""

    said: Any
    worth: float


def pairs(answers: Sequence[Answer], settings: OrderSettings) -> Iterator[tuple[Answer, Answer]]:
    """(better, worse) of the answers that settings say are compared, the best first."""
    for better, worse in _compared(tiers(answers), settings.pairs):
        for pair in itertools.product(better, worse):
            if pair[0].worth - pair[1].worth >= settings.min_gap and pair[0].said != pair[1].said:
                yield pair


def extremes(answers: Sequence[Answer], settings: OrderSettings) -> Iterator[tuple[Answer, bool]]:
    """The best answers as wanted, the worst as unwanted. Those between are neither; where all tie there are none."""
    found = tiers(answers)
    if len(found) > 1 and found[0][0].worth - found[-1][0].worth >= settings.min_gap:
        yield from ((answer, True) for answer in found[0])
        yield from ((answer, False) for answer in found[-1])


def tiers(answers: Iterable[Answer]) -> list[list[Answer]]:
    """Answers of equal worth together, the best first; in their own order among themselves."""
    ordered = sorted(answers, key=lambda answer: -answer.worth)
    return [list(tier) for _, tier in itertools.groupby(ordered, key=lambda answer: answer.worth)]


def preference(better: Answer, worse: Answer) -> dict[str, Any]:
    """What a pair adds to its prompt. margin: how much better the one is, in ranks or points."""
    return {"chosen": better.said, "rejected": worse.said, "margin": better.worth - worse.worth}


def faults(settings: OrderSettings) -> Iterator[Fault]:
    """Values that settings cannot have."""
    if settings.pairs not in PAIRS:
        what = f"data.pairs={settings.pairs} is not known.{near(settings.pairs, PAIRS)}"
        yield Fault(what, f"set data.pairs to one of {', '.join(PAIRS)}")
    if settings.min_gap < 0:
        yield Fault(f"data.min_gap={settings.min_gap} is negative", "set data.min_gap to 0 or more")


def _compared(found: list[list[Answer]], which: str) -> Iterable[tuple[list[Answer], list[Answer]]]:
    if which == "all":
        return itertools.combinations(found, 2)
    return itertools.pairwise(found if which == "adjacent" else found[:1] + found[1:][-1:])
