"""Loss on rows that are not trained on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Batch, Data, Evaluator
from loomtune_plugins.evaluators.settings import HeldoutSettings
from loomtune_plugins.evaluators.split import check_split, limit

if TYPE_CHECKING:
    from loomtune.run import Run

Sums = dict[str, tuple[float, float]]
"""Name to (sum, weight)."""


class Heldout(Evaluator):
    """The objective's own loss, and its own metrics, counted over a whole split as the loop counts them over a step.

    `heldout_loss` is the sum of the objective's terms, each divided by its weight over all rows and ranks. Where that
    is a likelihood and weighs target tokens, and only there, `heldout_perplexity` is its exponential: that of a
    divergence from a teacher says nothing. What the objective reports besides comes as `heldout_<name>`.
    """

    def __init__(self, settings: HeldoutSettings) -> None:
        self._settings = settings

    def check(self, data: Data) -> None:
        """Raises UserError where the data lack the split."""
        check_split(data, "heldout", self._settings.split)

    def reads(self, splits: Sequence[str]) -> Sequence[str]:
        return [self._settings.split]

    def evaluate(self, run: Run) -> Mapping[str, float]:
        """Metrics, equal on every rank."""
        self.check(run.data)
        batches = run.batches(self._settings.split, limit(run, self._settings.rows))
        names = list(run.objective.terms())
        with run.policy.engine.evaluating():
            totals = _totals(run, names, batches)
            terms, metrics = _sums(run, names, batches, totals)
        loss = sum(sums / totals[name] for name, sums in terms.items() if totals[name])
        found = {"heldout_loss": loss}
        (targets,) = run.world.sum([float(sum(batch.target.numel() for batch in batches))])
        if run.objective.is_likelihood() and [totals[name] for name in names] == [targets]:
            found["heldout_perplexity"] = math.exp(min(loss, 700.0))
        return found | {f"heldout_{name}": total / weight for name, (total, weight) in metrics.items() if weight}


def _totals(run: Run, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, float]:
    weights = [run.objective.weights(batch) for batch in batches]
    summed = run.world.sum([math.fsum(weight.get(name, 0.0) for weight in weights) for name in names])
    return dict(zip(names, summed, strict=True))


def _sums(
    run: Run, names: Sequence[str], batches: Sequence[Batch], totals: Mapping[str, float]
) -> tuple[dict[str, float], Sums]:
    """Each term's sum, and each metric's sum and weight, over all batches and ranks."""
    statistics = run.objective.statistics(run.roles, batches, run.world)
    mine: list[tuple[str, float, float]] = []
    for batch in batches:  # equally many on every rank
        run.heed()
        found = run.objective.loss(run.roles, batch, totals, statistics)
        mine += [(f"term:{name}", float(value), 0.0) for name, value in found.terms.items()]
        mine += [(name, float(total), float(weight)) for name, (total, weight) in found.metrics.items()]
    everyone = _added(entry for part in run.world.gather(mine if run.world.counts else []) for entry in part)
    return {name: everyone.pop(f"term:{name}", (0.0, 0.0))[0] for name in names}, everyone


def _added(entries: Iterable[tuple[str, float, float]]) -> Sums:
    """Sums by name, in the order of ranks, so that every rank has the same."""
    found: Sums = defaultdict(lambda: (0.0, 0.0))
    for name, total, weight in entries:
        found[name] = (found[name][0] + total, found[name][1] + weight)
    return dict(found)
