"""What a step sums over micro-batches and ranks, and the global means that are logged of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from loomtune.contracts import Batch, LossSums
from loomtune.world import World

TERM = "term:"


class StepSums:
    """Sums of terms and metrics with their weights: divided once, at the end, so that a mean of means cannot happen."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, result: LossSums, batch: Batch) -> None:
        """Takes a micro-batch up."""
        for name, (value, weight) in _numbers(result, batch):
            before, weighed = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = before + float(value), weighed + float(weight)

    def means(self, world: World, totals: Mapping[str, float]) -> dict[str, float]:
        """Global means; `loss` is the sum of all terms' means. totals: each term's weight over the whole step."""
        names = sorted(self._sums)
        flat = world.sum([number for name in names for number in self._sums[name]])
        pairs = {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(names)}
        terms = {name.removeprefix(TERM): pairs.pop(name)[0] for name in names if name.startswith(TERM)}
        means = {term: value / totals[term] if totals[term] else 0.0 for term, value in terms.items()}
        metrics = {"loss": sum(means.values()), **({} if len(means) == 1 else means)}
        metrics["tokens"] = pairs.pop("tokens")[0]
        return metrics | {name: value / weight if weight else math.nan for name, (value, weight) in pairs.items()}


def _numbers(result: LossSums, batch: Batch) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for term, value in result.terms.items():
        yield f"{TERM}{term}", (value.detach(), 0.0)
    yield "tokens", (len(batch.target), 0.0)
    yield from result.metrics.items()
