"""One optimizer step: from micro-batches to changed weights, in the loop, in a dry step and in a rehearsal alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch

from loomtune.contracts import Judgement, Step, Verdict
from loomtune.errors import RunFailed
from loomtune.means import StepSums
from loomtune.run import Run


class Stepper:
    """A run's steps, one after the other. Every call is collective."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def totals(self, batches: Step) -> dict[str, float]:
        """Each term's weight over the whole step: the one number that every gradient is divided by."""
        run = self.run
        terms = list(run.objective.terms())
        mine: dict[str, float] = defaultdict(float)
        for batch in batches:
            for term, weight in run.objective.weights(batch).items():
                mine[term] += weight
        totals = dict(zip(terms, run.world.sum([mine[term] for term in terms]), strict=True))
        if not any(totals.values()):
            raise RunFailed(f"step {run.step} has nothing to learn from: the weight of all its rows is 0")
        return totals

    def accumulate(self, batches: Step, totals: Mapping[str, float]) -> StepSums:
        """Adds up the gradients of the step's micro-batches, and what is logged of them."""
        run, sums = self.run, StepSums()
        with run.phases("forward"), torch.no_grad():
            statistics = run.objective.statistics(run.roles, batches, run.world)
        for index, batch in enumerate(batches):
            with run.accumulating(last=index == len(batches) - 1):
                with run.phases("forward"):
                    result = run.objective.loss(run.roles, batch, totals, statistics)
                with run.phases("backward"):
                    for engine, loss in run.losses(result, totals):
                        engine.backward(loss)
            sums.add(result, batch)
        return sums

    def update(self, rate: float, loss: float) -> tuple[Verdict, float]:
        """Asks the guards once, by the norm over all engines, then steps all of them or none; gives both."""
        verdicts: list[Verdict] = []
        engines = self.run.trained_engines()

        def step(index: int, before: list[float]) -> bool:
            """Each engine waits, its norm known, until those after it know theirs."""
            if index == len(engines):
                verdicts.append(self._judge(loss, math.hypot(*before)))
                return verdicts[-1] is Verdict.CONTINUE

            def proceed(norm: float) -> bool:
                norms.append(norm)
                return step(index + 1, [*before, norm])

            engines[index].step(rate, self.run.optimizer.clip, proceed)
            return verdicts[-1] is Verdict.CONTINUE

        norms: list[float] = []
        with self.run.phases("optimizer"):
            step(0, [])
        return verdicts[-1], math.hypot(*norms)

    def _judge(self, loss: float, norm: float) -> Verdict:
        run = self.run
        judged = [guard.judge(run.step, loss, norm) for guard in run.guards]
        gravest = max(judged, key=lambda judgement: judgement.verdict, default=Judgement(Verdict.CONTINUE))
        if gravest.verdict is Verdict.STOP:
            raise RunFailed(f"step {run.step}: {gravest.reason}")
        if gravest.verdict is not Verdict.CONTINUE:
            done = "skipped" if gravest.verdict is Verdict.SKIP else "rolled back"
            run.tell_once(f"step {run.step} {done}: {gravest.reason}")
        return gravest.verdict
