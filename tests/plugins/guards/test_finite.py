"""Steps that are not finite are skipped, and too many of them stop the run."""

import math

import pytest

from loomtune.contracts import Verdict
from loomtune_plugins.guards.finite import Finite
from loomtune_plugins.guards.settings import FiniteSettings


def verdicts(guard: Finite, losses: list[float]) -> list[Verdict]:
    return [guard.judge(step, loss, 1.0).verdict for step, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (-math.inf, 1.0)]
)
def test_a_step_that_is_not_finite_is_skipped_with_its_numbers(loss: float, norm: float) -> None:
    judged = Finite(FiniteSettings()).judge(7, loss, norm)
    assert judged.verdict is Verdict.SKIP
    assert judged.reason == f"step 7: loss {loss:g}, gradient norm {norm:g}"


def test_a_finite_step_goes_on() -> None:
    assert Finite(FiniteSettings()).judge(1, 2.0, 1e9).verdict is Verdict.CONTINUE


def test_more_than_patience_in_a_row_stops_the_run_with_a_cure() -> None:
    guard = Finite(FiniteSettings(patience=2))
    assert verdicts(guard, [math.nan] * 2) == [Verdict.SKIP] * 2
    stopped = guard.judge(3, math.nan, 1.0)
    assert stopped.verdict is Verdict.STOP
    assert "optimizer.lr" in stopped.reason


def test_a_finite_step_starts_the_count_again() -> None:
    losses = [math.nan, math.nan, 1.0, math.nan, math.nan]
    expected = [Verdict.SKIP, Verdict.SKIP, Verdict.CONTINUE, Verdict.SKIP, Verdict.SKIP]
    assert verdicts(Finite(FiniteSettings(patience=2)), losses) == expected


def test_a_step_that_is_judged_once_for_each_network_counts_once() -> None:
    guard = Finite(FiniteSettings(patience=1))
    assert [guard.judge(step, math.nan, 1.0).verdict for step in (1, 1, 2)] == [
        Verdict.SKIP,
        Verdict.SKIP,
        Verdict.STOP,
    ]
