"""The training loop: from a step's rows to a changed model, the same for every objective, adapter and sharding."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from loomtune.batching import MicroLimit, Order, micro_limit, step_batches
from loomtune.contracts import Engine, LossSums, Step, Verdict
from loomtune.errors import RunFailed
from loomtune.evaluation import Best, evaluate
from loomtune.keeper import Keeper
from loomtune.run import Run
from loomtune.signals import StopRequest
from loomtune.world import reseed

Sums = dict[str, list[float]]


def _sums() -> defaultdict[str, list[float]]:
    return defaultdict(lambda: [0.0, 0.0])


class Loop:
    """One attempt's steps, from where the run stands to its last."""

    def __init__(self, run: Run, keeper: Keeper, stop: StopRequest) -> None:
        self.run, self.keeper, self.stop = run, keeper, stop
        self.order = Order(run.settings.seed, len(run.splits["train"]))
        self.limit: MicroLimit = micro_limit(run)
        self.best = Best(run.settings.evaluate, keeper.state.get("best"))
        self.tokens_seen = int(keeper.state.get("tokens_seen", 0))
        self.fetched = int(keeper.state.get("fetched", 0))
        self.left = False

    def train(self) -> str:
        """Runs to the last step; gives the status: `completed`, `stopped` or `preempted`."""
        run = self.run
        last = min(run.settings.stop_after or run.steps, run.steps)
        if run.step == 0 and run.settings.evaluate.before:
            evaluate(run, suffix="_before")
        for batches in self._steps(last):
            self._step(batches)
            if self._after_step(last):
                break
        return self._end()

    def _steps(self, last: int) -> Iterator[Step]:
        run = self.run
        while run.step < last:
            numbers = range(self.fetched, min(self.fetched + run.settings.batch.size, run.samples_planned))
            rows = step_batches(run, numbers, self.order, self.limit)
            self.fetched += len(numbers)
            for batches in run.objective.experience(run, rows):
                run.step += 1
                yield batches
                if run.step >= last:
                    return

    def _step(self, batches: Step) -> None:
        run, began = self.run, time.perf_counter()
        run.events.tell("step_started", run=run, step=run.step)
        reseed(run.settings.seed, run.step, run.world.rank)
        totals = self._totals(batches)
        sums = self._accumulate(batches, totals)
        rate = run.optimizer.learning_rate * run.schedule.factor(run.step, run.steps)
        metrics = self._reduced(sums, totals)
        norm = self._update(rate, metrics["loss"])
        self.tokens_seen += int(metrics["tokens"])
        seconds = time.perf_counter() - began
        metrics |= {
            "grad_norm": norm,
            "lr": rate,
            "tokens_seen": self.tokens_seen,
            "seconds": seconds,
            "tokens_per_second": metrics["tokens"] / seconds,
            "memory_bytes": run.world.memory_bytes(),
        }
        run.metrics |= metrics
        run.events.tell("step_finished", run=run, step=run.step, metrics=metrics)

    def _totals(self, batches: Step) -> dict[str, float]:
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

    def _accumulate(self, batches: Step, totals: Mapping[str, float]) -> Sums:
        run, sums = self.run, _sums()
        statistics = run.objective.statistics(run.roles, batches, run.world)
        for index, batch in enumerate(batches):
            with run.accumulating(last=index == len(batches) - 1):
                result = run.objective.loss(run.roles, batch, totals, statistics)
                for engine, loss in self._losses(result, totals):
                    engine.backward(loss)
            for name, (value, weight) in self._numbers(result, batch, totals):
                sums[name][0] += float(value)
                sums[name][1] += float(weight)
        return dict(sums)

    def _losses(self, result: LossSums, totals: Mapping[str, float]) -> list[tuple[Engine, torch.Tensor]]:
        """One scalar for each trained engine: its terms, each divided by its weight in the whole step."""
        run, losses = self.run, dict[Engine, torch.Tensor]()
        for term, value in result.terms.items():
            engine = run.roles[run.objective.terms()[term]].engine
            part = value / totals[term] if totals[term] else value * 0.0
            losses[engine] = losses[engine] + part if engine in losses else part
        return list(losses.items())

    def _numbers(
        self, result: LossSums, batch: Any, totals: Mapping[str, float]
    ) -> Iterator[tuple[str, tuple[Any, Any]]]:
        for term, value in result.terms.items():
            yield f"term:{term}", (value.detach(), 0.0)
        yield "tokens", (len(batch.target), 0.0)
        yield from result.metrics.items()

    def _reduced(self, sums: Sums, totals: Mapping[str, float]) -> dict[str, float]:
        """Global means of everything that was summed; `loss` is the sum of all terms' means."""
        names = sorted(sums)
        flat = self.run.world.sum([number for name in names for number in sums[name]])
        pairs = {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(names)}
        terms = {name[5:]: value for name, (value, _) in pairs.items() if name.startswith("term:")}
        means = {term: value / totals[term] if totals[term] else 0.0 for term, value in terms.items()}
        metrics = {"loss": sum(means.values()), **({} if len(means) == 1 else means)}
        metrics["tokens"] = pairs.pop("tokens")[0]
        kept = {name: pair for name, pair in pairs.items() if not name.startswith("term:")}
        return metrics | {name: value / weight if weight else math.nan for name, (value, weight) in kept.items()}

    def _update(self, rate: float, loss: float) -> float:
        """Asks the guards, then steps every trained engine; gives the norm over all of them."""
        run, norms = self.run, []
        for engine in run.trained_engines():

            def proceed(norm: float) -> bool:
                return self._judge(loss, norm) is Verdict.CONTINUE

            norms.append(engine.step(rate, run.optimizer.clip, proceed))
        return math.sqrt(sum(norm * norm for norm in norms)) if len(norms) > 1 else norms[0]

    def _judge(self, loss: float, norm: float) -> Verdict:
        run = self.run
        judged = [guard.judge(run.step, loss, norm) for guard in run.guards]
        gravest = max(judged, key=lambda judgement: judgement.verdict, default=None)
        if gravest is None:
            return Verdict.CONTINUE
        if gravest.verdict is Verdict.STOP:
            raise RunFailed(f"step {run.step}: {gravest.reason}")
        if gravest.verdict is not Verdict.CONTINUE:
            run.tell_once(f"step {run.step} skipped: {gravest.reason}")
        if gravest.verdict is Verdict.ROLL_BACK:
            self.keeper.restore()
        return gravest.verdict

    def _after_step(self, last: int) -> bool:
        """Evaluates, saves and hears requests to stop, at the step's edge; True where the run ends here."""
        run, every = self.run, self.run.settings.evaluate.every
        leaves, written = self._agree()
        improved = enough = False
        if (every and run.step % every == 0) or (run.step == last and not leaves):
            improved, enough = self.best.update(evaluate(run), run.step)
        at_edge = run.settings.checkpoint.every and run.step % run.settings.checkpoint.every == 0
        if at_edge or improved or enough or leaves or run.step == last:
            self.keeper.save(self._state(), best=improved)
        elif written:
            self.keeper.finish()
        return leaves or enough

    def _agree(self) -> tuple[bool, bool]:
        """(some rank was asked to stop, every rank has written the checkpoint under way)."""
        asked, written = self.run.world.sum([float(self.stop.requested), float(self.keeper.ready())])
        self.left = asked > 0
        return self.left, written == self.run.world.size

    def _state(self) -> dict[str, Any]:
        return {"fetched": self.fetched, "tokens_seen": self.tokens_seen, "best": self.best.state()}

    def _end(self) -> str:
        self.keeper.finish()
        if self.left:
            return "preempted"
        return "completed" if self.run.step >= self.run.steps else "stopped"
