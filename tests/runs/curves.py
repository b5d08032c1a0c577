"""Comparing the curves of runs."""

from __future__ import annotations

from runs.worlds import Outcome

LOSS, NORM = 2e-6, 1e-5
"""Largest relative differences over 40 steps; one unit in the last place at the start gives 4e-7 and 4e-6."""


def largest(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two curves."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def agree(one: Outcome, other: Outcome) -> None:
    """Both curves are the same, and so is what was seen of the data."""
    assert one.series("tokens") == other.series("tokens")
    assert one.series("lr") == other.series("lr")
    loss, norm = (largest(one.series(name), other.series(name)) for name in ("loss", "grad_norm"))
    assert loss < LOSS and norm < NORM, f"relative differences: loss {loss:.1e}, gradient norm {norm:.1e}"
