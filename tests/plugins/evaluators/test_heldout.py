"""The held-out loss is the loss of the whole split, however it is cut into batches and ranks."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loomtune.batching import collate
from loomtune.contracts import Batch, LossSums, Sample, Segment
from loomtune.errors import UserError
from loomtune.settings import Settings
from loomtune_plugins.evaluators.heldout import Heldout
from loomtune_plugins.evaluators.settings import HeldoutSettings


class TwoRanks:
    """A world of two ranks that hold the same, each for itself."""

    counts = True

    def sum(self, numbers: list[float]) -> list[float]:
        return [2 * number for number in numbers]

    def gather(self, thing: Any) -> list[Any]:
        return [thing, thing]


class Alone(TwoRanks):
    def sum(self, numbers: list[float]) -> list[float]:
        return list(numbers)

    def gather(self, thing: Any) -> list[Any]:
        return [thing]


@dataclass
class PerToken:
    """An objective whose loss of a target is a hundredth of its id, and that reports the share of even ids."""

    weigh_pairs: bool = False
    likelihood: bool = True
    seen_statistics: list[int] = field(default_factory=list)

    def terms(self) -> Mapping[str, str]:
        return {"loss": "policy"}

    def is_likelihood(self) -> bool:
        return self.likelihood

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"loss": len(batch.sample_numbers) / 2 if self.weigh_pairs else float(len(batch.target))}

    def statistics(self, roles: Any, step: list[Batch], world: Any) -> Mapping[str, Any]:
        return {"batches": len(step)}

    def loss(self, roles: Any, batch: Batch, totals: Any, statistics: Mapping[str, Any]) -> LossSums:
        self.seen_statistics.append(statistics["batches"])
        values = batch.target.double()
        even = (batch.target % 2 == 0).double()
        return LossSums({"loss": values.sum() / 100}, {"even": (even.sum(), torch.tensor(float(len(even))))})


SAMPLES = [Sample((Segment(np.arange(10, 10 + n, dtype=np.int32), np.arange(n) >= n // 2),)) for n in (4, 9, 2, 6, 7)]


def a_run(*cuts: int, objective: Any = None, world: Any = None) -> Any:
    """A run whose validation split is cut into batches of so many samples."""
    asked: list[tuple[str, int]] = []
    batches, start = [], 0
    for count in cuts:
        numbers = range(start, start + count)
        batches.append(collate([SAMPLES[n] for n in numbers], numbers, 0))
        start += count

    def give(split: str, limit: int) -> list[Batch]:
        asked.append((split, limit))
        return batches

    engine = SimpleNamespace(evaluating=nullcontext)
    return SimpleNamespace(
        batches=give,
        asked=asked,
        objective=objective or PerToken(),
        roles={},
        policy=SimpleNamespace(engine=engine),
        heed=lambda: None,
        world=world or Alone(),
        data=SimpleNamespace(splits=lambda: ("train", "validation")),
        settings=Settings(),
    )


def by_hand() -> float:
    targets = [int(t) for s in SAMPLES for t in s.segments[0].tokens[s.segments[0].is_target]]
    return sum(targets) / 100 / len(targets)


@pytest.mark.parametrize("cuts", [(5,), (1, 1, 1, 1, 1), (2, 3, 0)])
def test_the_loss_is_the_mean_over_all_targets_however_they_are_batched(cuts: tuple[int, ...]) -> None:
    found = Heldout(HeldoutSettings()).evaluate(a_run(*cuts))
    assert found["heldout_loss"] == pytest.approx(by_hand(), rel=1e-12)
    assert found["heldout_perplexity"] == pytest.approx(math.exp(by_hand()), rel=1e-12)


def test_sums_are_taken_over_ranks_before_any_division() -> None:
    alone = Heldout(HeldoutSettings()).evaluate(a_run(2, 3))
    assert Heldout(HeldoutSettings()).evaluate(a_run(2, 3, world=TwoRanks())) == pytest.approx(alone, rel=1e-12)


def test_the_objectives_own_metrics_are_means_over_the_split() -> None:
    targets = [int(t) for s in SAMPLES for t in s.segments[0].tokens[s.segments[0].is_target]]
    found = Heldout(HeldoutSettings()).evaluate(a_run(1, 4))
    assert found["heldout_even"] == pytest.approx(sum(t % 2 == 0 for t in targets) / len(targets))


def test_a_request_to_stop_is_heard_before_each_batch() -> None:
    run, heard = a_run(1, 3, 1), []
    run.heed = lambda: heard.append(len(heard))
    Heldout(HeldoutSettings()).evaluate(run)
    assert heard == [0, 1, 2]


def test_a_loss_that_does_not_weigh_tokens_has_no_perplexity() -> None:
    found = Heldout(HeldoutSettings()).evaluate(a_run(2, 3, objective=PerToken(weigh_pairs=True)))
    assert "heldout_perplexity" not in found and "heldout_loss" in found


def test_a_divergence_has_no_perplexity_though_it_weighs_tokens() -> None:
    found = Heldout(HeldoutSettings()).evaluate(a_run(2, 3, objective=PerToken(likelihood=False)))
    assert "heldout_perplexity" not in found and "heldout_loss" in found


def test_only_what_learns_the_targets_alone_is_a_likelihood() -> None:
    from loomtune_plugins.losses.distributions import Kl
    from loomtune_plugins.losses.settings import KlSettings
    from loomtune_plugins.objectives.distill import Distill
    from loomtune_plugins.objectives.distill_settings import DistillSettings
    from loomtune_plugins.objectives.pretrain import Pretrain
    from loomtune_plugins.objectives.pretrain_settings import PretrainSettings
    from loomtune_plugins.objectives.sft import Sft
    from loomtune_plugins.objectives.sft_settings import SftSettings

    anchored = Sft(SftSettings())
    anchored.use({"kl": Kl(KlSettings())}, {})
    made = Sft(SftSettings()), Pretrain(PretrainSettings()), anchored, Distill(DistillSettings())
    assert [one.is_likelihood() for one in made] == [True, True, False, False]


def test_statistics_are_of_the_whole_split() -> None:
    objective = PerToken()
    Heldout(HeldoutSettings()).evaluate(a_run(2, 2, 1, objective=objective))
    assert objective.seen_statistics == [3, 3, 3]


def test_its_own_number_of_rows_comes_before_that_of_the_run() -> None:
    run = a_run(5)
    run.settings.evaluate.rows = 7
    Heldout(HeldoutSettings()).evaluate(run)
    Heldout(HeldoutSettings(rows=3)).evaluate(run)
    assert run.asked == [("validation", 7), ("validation", 3)]


def test_a_split_that_is_not_there_is_refused_naming_those_that_are() -> None:
    with pytest.raises(
        UserError, match=r"Did you mean 'validation'\?(.|\n)*evaluator\.heldout\.split to one of: train, va"
    ):
        Heldout(HeldoutSettings(split="validaton")).evaluate(a_run(5))
