"""What a step's micro-batches say together: extremes, and whether the invariants hold at the first step of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loomtune_plugins.objectives.online.invariants import FIRST, FRESH, Apart, Bounds

if TYPE_CHECKING:
    from loomtune.contracts import Batch
    from loomtune.world import World


Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Watch:
    """Goes along with the micro-batches of one step; after the last, all ranks tell each other what they saw.

    left: micro-batches that are still to come, equally many on every rank. first: as the samples of the step say.
    """

    world: World
    left: int
    first: float
    bounds: Bounds
    least: float = math.inf
    most: float = -math.inf
    apart: dict[str, Apart] = field(default_factory=dict)

    def see(self, log_probs: Tensor, ratio: Tensor, batch: Batch) -> Metrics:
        """Takes in a micro-batch. log_probs, ratio: `(targets,)`. Gives the metrics of the step with its last one.

        Raises Disagreement, on every rank, where this is the first step of a batch and an invariant does not hold.
        """
        with torch.no_grad():
            if ratio.numel():
                self.least, self.most = min(self.least, float(ratio.min())), max(self.most, float(ratio.max()))
            for name, column in (("rollout", "rollout"), ("ratio", "old"), ("kl", "reference")):
                if column in batch.columns and self.first:
                    seen = (log_probs - batch.columns[column]).abs()
                    self.apart[name] = Apart.joined([self.apart.get(name, Apart()), _apart(seen)])
        self.left -= 1
        zero = log_probs.new_zeros(())
        found: Metrics = {"ratio/min": (zero, zero), "ratio/max": (zero, zero)}
        if "rollout" in batch.columns and self.first:
            found |= {"rollout/apart_mean": (zero, zero), "rollout/apart_max": (zero, zero)}
        return found if self.left else found | self._told(log_probs)

    def _told(self, like: Tensor) -> Metrics:
        """What all ranks saw; each says it alike, so that its mean is it."""
        seen = self.world.gather((self.least, self.most, self.apart))
        apart = [Apart.joined([each.get(name, Apart()) for *_, each in seen]) for name in ("rollout", "ratio", "kl")]
        if self.first >= FIRST:
            self.bounds.check(apart[0], apart[1], apart[2] if self.first == FRESH else Apart())
        least, most = min(low for low, *_ in seen), max(high for _, high, _ in seen)
        found: Mapping[str, float] = {"ratio/min": least, "ratio/max": most} if most >= least else {}
        if (rollout := apart[0]).count:
            found = {**found, "rollout/apart_mean": rollout.mean, "rollout/apart_max": rollout.largest}
        one = like.new_ones(())
        return {name: (like.new_tensor(value), one) for name, value in found.items()}


def _apart(differences: Tensor) -> Apart:
    if not differences.numel():
        return Apart()
    return Apart(float(differences.double().sum()), float(differences.max()), float(differences.numel()))
