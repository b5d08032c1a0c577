"""Losses of whole distributions: answers of a step are compared by rank (optimal transport in one dimension).

What an answer is compared with is another's number, gathered from all ranks without gradient; each pair's own numbers
carry it, so that the sum over micro-batches and ranks has the gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Pairs
from loomtune_plugins.losses.base import PairLoss
from loomtune_plugins.losses.margins import smoothed

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.world import World


class Aot(PairLoss):
    """Melnyk et al. 2024, "Distributional Preference Alignment via Optimal Transport", algorithm 1, paired.

    Margins of the policy dominate those of the reference, quantile by quantile, over all pairs of the step; in TRL over
    those of a micro-batch.
    """

    name = "aot"
    needs_reference = True
    looks_around = True

    def statistics(self, step: Sequence[Pairs], world: World) -> tuple[Tensor, Tensor]:
        """The margins of all pairs of the step, sorted: under the policy, and under the reference."""
        return _sorted(step, world, _margins), _sorted(step, world, _reference_margins)

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        margins, reference = statistics
        mine = _margins(pairs)
        return smoothed(pairs.beta * (mine - reference[_ranks(mine, margins)]), self.settings.label_smoothing)


class AotUnpaired(PairLoss):
    """The same, unpaired: log-ratios of all chosen answers dominate those of all rejected ones."""

    name = "aot_unpaired"
    needs_reference = True
    looks_around = True

    def statistics(self, step: Sequence[Pairs], world: World) -> tuple[Tensor, Tensor]:
        """The log-ratios of the step's chosen and rejected answers, each sorted."""
        return _sorted(step, world, _chosen), _sorted(step, world, _rejected)

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        best, worst = statistics
        chosen, rejected = _chosen(pairs), _rejected(pairs)
        up = self._loss(pairs.beta * (chosen - worst[_ranks(chosen, best)]))
        down = self._loss(pairs.beta * (best[_ranks(rejected, worst)] - rejected))
        return up + down - down.detach()  # the same comparisons, seen from the other side: counted once

    def _loss(self, logits: Tensor) -> Tensor:
        return smoothed(logits, self.settings.label_smoothing)


def _margins(pairs: Pairs) -> Tensor:
    return pairs.chosen - pairs.rejected


def _reference_margins(pairs: Pairs) -> Tensor:
    return pairs.reference_chosen - pairs.reference_rejected


def _chosen(pairs: Pairs) -> Tensor:
    return pairs.chosen - pairs.reference_chosen


def _rejected(pairs: Pairs) -> Tensor:
    return pairs.rejected - pairs.reference_rejected


def _sorted(step: Sequence[Pairs], world: World, of: Callable[[Pairs], Tensor]) -> Tensor:
    """A number of every pair of the step, over all data replicas."""
    import torch

    mine = [float(value) for pairs in step for value in of(pairs)] if world.counts else []
    like = of(step[0]) if step else torch.zeros(())
    return like.new_tensor(sorted(value for part in world.gather(mine) for value in part))


def _ranks(values: Tensor, ordered: Tensor) -> Tensor:
    """The place of each value among the sorted ones, which hold it but for rounding."""
    import torch

    if not len(ordered):
        return values.new_zeros(len(values), dtype=torch.int64)
    right = torch.searchsorted(ordered, values.detach()).clamp(max=len(ordered) - 1)
    left = (right - 1).clamp(min=0)
    nearer = (ordered[left] - values).abs() < (ordered[right] - values).abs()
    return torch.where(nearer, left, right)
