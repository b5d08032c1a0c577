"""What was measured, as little dependent on who else uses the machine as can be, and whether it reaches the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from contenders import BARE, LOOMTUNE, PACKED, TRL, Marks

WARM_UP = 2
"""First steps of each round that are not timed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender over all rounds, which all do the same work step by step.

    rate: examples per CPU second. A step counts with its quickest round: what disturbs can only add.
    rates: the same of each round by itself. wall: examples per second of the clock, median of rounds.
    """

    losses: list[float]
    rate: float
    rates: list[float]
    wall: float
    peak_bytes: float

    @classmethod
    def of(cls, rounds: Sequence[Marks]) -> Measured:
        """From the marks of each round."""
        examples = sum(mark["examples"] for mark in rounds[0][WARM_UP:])
        cpu = [_spent(marks, "cpu") for marks in rounds]
        return cls(
            losses=[mark["loss"] for mark in rounds[0]],
            rate=examples / sum(map(min, zip(*cpu, strict=True))),
            rates=[examples / sum(seconds) for seconds in cpu],
            wall=median(examples / sum(_spent(marks, "wall")) for marks in rounds),
            peak_bytes=max(marks[-1]["peak_bytes"] for marks in rounds),
        )


def _spent(marks: Marks, kind: str) -> list[float]:
    """Seconds of each timed step."""
    return [after[kind] - before[kind] for before, after in zip(marks[WARM_UP - 1 :], marks[WARM_UP:], strict=False)]


@dataclass(frozen=True, slots=True)
class Bar:
    """A number and what it has to be. at_least: the bar is a floor; else a ceiling."""

    what: str
    value: float
    limit: float
    at_least: bool
    spread: tuple[float, float] | None = None

    @property
    def reached(self) -> bool:
        """True where the number is on the right side."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def bars(measured: Mapping[str, Measured]) -> list[Bar]:
    """All that can be said of these contenders."""
    found = []
    ours = measured[LOOMTUNE]
    found.append(_equal(BARE, ours, measured[BARE], 1e-5))
    found.append(_ratio("time against the bare loop", measured[BARE], ours, 1.03, at_least=False))
    if TRL in measured:
        trl = measured[TRL]
        found.append(_equal(TRL, ours, trl, 1e-4))
        found.append(_ratio(f"speed against {TRL}", ours, trl, 3.0))
        found.append(_ratio(f"speed against {PACKED}", ours, measured[PACKED], 2.0))
        found.append(Bar(f"peak memory against {TRL}", ours.peak_bytes / trl.peak_bytes, 0.4, False))
        found.append(_ratio(f"speed of the bare loop against {TRL}", measured[BARE], trl, 3.0))
    return found


def _equal(name: str, ours: Measured, theirs: Measured, limit: float) -> Bar:
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    return Bar(f"largest relative difference of losses from {name}", apart, limit, False)


def _ratio(what: str, quick: Measured, slow: Measured, limit: float, *, at_least: bool = True) -> Bar:
    pairs = [a / b for a, b in zip(quick.rates, slow.rates, strict=True)]
    return Bar(what, quick.rate / slow.rate, limit, at_least, (min(pairs), max(pairs)))


def table(measured: Mapping[str, Measured], judged: Sequence[Bar]) -> str:
    """Both as Markdown."""
    lines = ["| contender | examples/s of CPU | examples/s of the clock | peak RSS, MiB |", "|---|---:|---:|---:|"]
    for name, one in measured.items():
        lines.append(f"| {name} | {one.rate:.2f} | {one.wall:.2f} | {one.peak_bytes / 2**20:,.0f} |")
    lines += ["", "| number | measured | single rounds | bar | |", "|---|---:|---:|---:|---|"]
    for bar in judged:
        spread = f"{bar.spread[0]:.2f} to {bar.spread[1]:.2f}" if bar.spread else ""
        sign = "≥" if bar.at_least else "≤"
        verdict = "reached" if bar.reached else "**missed**"
        lines.append(f"| {bar.what} | {bar.value:.3g} | {spread} | {sign} {bar.limit:g} | {verdict} |")
    return "\n".join(lines)
