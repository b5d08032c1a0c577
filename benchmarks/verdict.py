"""What was measured, as little dependent on who else uses the machine as can be, and whether it reaches the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from contenders import Marks

SPENT = {"wall", "cpu", "system", "peak_bytes", "examples"}
"""What the clock says of a step; all else in a mark was said by the contender."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender over all rounds, which all do the same work step by step.

    said: what it says of each step (loss, ...), in its first round. rate: examples per CPU second. A step counts with
    its quickest round: what disturbs can only add. rates: the same of each round by itself. wall: examples per second
    of the clock, median of rounds.
    """

    said: Mapping[str, list[float]]
    rate: float
    rates: list[float]
    wall: float
    peak_bytes: float

    @classmethod
    def of(cls, rounds: Sequence[Marks], warm_up: int) -> Measured:
        """From the marks of each round. warm_up: first steps of each that are not timed."""
        examples = sum(mark["examples"] for mark in rounds[0][warm_up:])
        cpu, wall = ([_spent(marks, kind, warm_up) for marks in rounds] for kind in ("cpu", "wall"))
        return cls(
            said={name: [mark[name] for mark in rounds[0]] for name in rounds[0][0] if name not in SPENT},
            rate=examples / sum(map(min, zip(*cpu, strict=True))),
            rates=[examples / sum(seconds) for seconds in cpu],
            wall=median(examples / sum(seconds) for seconds in wall),
            peak_bytes=max(marks[-1]["peak_bytes"] for marks in rounds),
        )


def _spent(marks: Marks, kind: str, warm_up: int) -> list[float]:
    """Seconds of each timed step."""
    return [after[kind] - before[kind] for before, after in zip(marks[warm_up - 1 :], marks[warm_up:], strict=False)]


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


def equal(said: str, of: str, ours: Measured, theirs: Measured, limit: float, steps: int | None = None) -> Bar:
    """What both say of each step, or of the first ones. said: its name in the marks. of: whose it is compared with."""
    pairs = zip(ours.said[said][:steps], theirs.said[said][:steps], strict=True)
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    where = "" if steps is None else " in the first step"
    return Bar(f"largest relative difference of {said}{where} from {of}", apart, limit, False)


def ratio(what: str, quick: Measured, slow: Measured, limit: float, *, at_least: bool = True) -> Bar:
    """How many times as many examples the first does in a CPU second."""
    pairs = [a / b for a, b in zip(quick.rates, slow.rates, strict=True)]
    return Bar(what, quick.rate / slow.rate, limit, at_least, (min(pairs), max(pairs)))


def memory(of: str, ours: Measured, theirs: Measured, limit: float) -> Bar:
    """Our largest resident set as a share of theirs."""
    return Bar(f"peak memory against {of}", ours.peak_bytes / theirs.peak_bytes, limit, False)


def table(measured: Mapping[str, Measured], judged: Sequence[Bar], examples: str) -> str:
    """Both as Markdown. examples: what they are called."""
    lines = [f"| contender | {examples}/s of CPU | {examples}/s of the clock | peak RSS, MiB |", "|---|---:|---:|---:|"]
    for name, one in measured.items():
        lines.append(f"| {name} | {one.rate:.2f} | {one.wall:.2f} | {one.peak_bytes / 2**20:,.0f} |")
    lines += ["", "| number | measured | single rounds | bar | |", "|---|---:|---:|---:|---|"]
    for bar in judged:
        spread = f"{bar.spread[0]:.2f} to {bar.spread[1]:.2f}" if bar.spread else ""
        sign = "≥" if bar.at_least else "≤"
        verdict = "reached" if bar.reached else "**missed**"
        lines.append(f"| {bar.what} | {bar.value:.3g} | {spread} | {sign} {bar.limit:g} | {verdict} |")
    return "\n".join(lines)
