"""What evaluators' metrics decide, and that measuring leaves no trace."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from loomtune.contracts import Evaluator
from loomtune.errors import RunFailed
from loomtune.evaluation import Best, evaluate
from loomtune.run import Run
from loomtune.settings import EvaluateSettings
from loomtune.world import reseed
from toys import TwoNetworks, made


class Drawing(Evaluator):
    """Measures what the global random states give, and whether gradients are kept."""

    def evaluate(self, run: Run) -> Mapping[str, float]:
        kept = float(torch.is_grad_enabled())
        return {"drawn": float(torch.rand(())), "drawn_too": random.random(), "gradients": kept}


def test_a_measurement_draws_alike_whatever_was_drawn_before(tmp_path: Path) -> None:
    toy = made(tmp_path, TwoNetworks(), evaluators={"drawing": Drawing()})
    toy.assembly.build_roles()
    first = evaluate(toy.run)
    torch.manual_seed(9), random.seed(9)
    assert evaluate(toy.run) == first
    toy.run.step = 1
    assert evaluate(toy.run)["drawn"] != first["drawn"]
    assert first["gradients"] == 0.0 and torch.is_grad_enabled()


def test_a_measurement_does_not_draw_again_what_the_step_before_it_drew(tmp_path: Path) -> None:
    toy = made(tmp_path, evaluators={"drawing": Drawing()})
    toy.assembly.build_roles()
    reseed(toy.run.settings.seed, toy.run.step, 0)
    assert float(torch.rand(())) != evaluate(toy.run)["drawn"]


def test_metrics_bear_the_suffix_and_join_those_of_the_run(tmp_path: Path) -> None:
    toy = made(tmp_path, evaluators={"drawing": Drawing()})
    toy.assembly.build_roles()
    assert set(evaluate(toy.run, "_before")) == {"drawn_before", "drawn_too_before", "gradients_before"}
    assert toy.run.metrics["gradients_before"] == 0.0


def decided(values: list[float], **settings: object) -> list[tuple[bool, bool]]:
    best = Best(EvaluateSettings(best="x", **settings), None)
    return [best.update({"x": value}, step) for step, value in enumerate(values)]


def test_the_best_is_the_least_or_where_asked_the_most() -> None:
    assert [better for better, _ in decided([2.0, 1.0, 1.0, 3.0])] == [True, True, False, False]
    assert [better for better, _ in decided([2.0, 1.0, 1.0, 3.0], mode="max")] == [True, False, False, True]


def test_what_is_no_number_is_never_the_best() -> None:
    assert [better for better, _ in decided([math.nan, 5.0, math.nan, 4.0])] == [False, True, False, True]


def test_patience_counts_evaluations_without_a_better_one_in_a_row() -> None:
    assert [enough for _, enough in decided([3.0, 4.0, 2.0, 5.0, 5.0], patience=2)] == [False] * 4 + [True]
    assert not any(enough for _, enough in decided([1.0, 2.0, 3.0]))


def test_the_best_is_remembered_over_a_restart() -> None:
    settings = EvaluateSettings(best="x", patience=2)
    before = Best(settings, None)
    before.update({"x": 1.0}, 10), before.update({"x": 2.0}, 20)
    after = Best(settings, before.state())
    assert (after.value, after.step) == (1.0, 10)
    assert after.update({"x": 1.5}, 30) == (False, True)


def test_a_metric_that_nobody_measured_is_refused_with_what_there_is() -> None:
    best = Best(EvaluateSettings(best="heldout_los"), None)
    with pytest.raises(RunFailed, match=r"heldout_los was not measured. Did you mean 'heldout_loss'\? There are: "):
        best.update({"heldout_loss": 1.0}, 1)


def test_without_a_metric_nothing_is_decided() -> None:
    assert Best(EvaluateSettings(patience=1), None).update({"x": 1.0}, 1) == (False, False)
