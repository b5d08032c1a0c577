"""The training loop: from a step's rows to a changed model, the same for every objective, adapter and sharding."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from loomtune.batching import micro_limit, step_batches
from loomtune.contracts import Verdict
from loomtune.errors import LeaseLost, Preempted, RunFailed, UserError
from loomtune.evaluation import Best, evaluate
from loomtune.feed import Feed
from loomtune.keeper import Keeper
from loomtune.run import Run
from loomtune.stepping import Stepper
from loomtune.streaming import Stream
from loomtune.world import derive, reseed


class Loop:
    """One attempt's steps, from where the run stands to its last."""

    def __init__(self, run: Run, keeper: Keeper) -> None:
        self.run, self.keeper, self.stepper = run, keeper, Stepper(run)
        self.feed = Feed(run, Stream(run, self._agree) if run.data.window else None)
        self.limit, self.left = micro_limit(run), False
        self._set(keeper.state)

    def _set(self, state: Mapping[str, Any]) -> None:
        self.best = Best(self.run.settings.evaluate, state.get("best"))
        self.tokens_seen = int(state.get("tokens_seen", 0))
        self.owed = bool(state.get("owed"))  # the evaluation at this step was not finished
        self.run.objective.resume(state.get("objective", {}))
        self.feed.set(state)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the loop."""
        kept = {"tokens_seen": self.tokens_seen, "best": self.best.state(), "owed": self.owed}
        return {**self.feed.state(), **kept, "objective": dict(self.run.objective.state())}

    def train(self) -> str:
        """Runs to the last step; gives the status: `completed`, `stopped` or `preempted`."""
        run = self.run
        last = min(run.settings.stop_after or run.steps, run.steps)
        with closing(self.feed):
            if run.step == 0 and run.settings.evaluate.before:
                evaluate(run, suffix="_before")
            ended = self._after_step(last) if self.owed else run.step >= last
            while not ended:
                began = time.perf_counter()
                self._fetch()
                if self._step(began) is Verdict.ROLL_BACK:
                    self._roll_back()
                else:
                    ended = self._after_step(last)
            return self._end()

    def _fetch(self) -> None:
        """Has the next step's samples. Where every rank hears that there are none, what was learned is kept."""
        reseed(derive(self.run.settings.seed, "experience"), self.run.step, self.run.world.replica)
        try:
            with self.run.phases("rollout" if self.run.objective.online() else "data"):
                self.feed.fetch()
        except (Preempted, UserError):
            if self.run.step:
                self.keeper.save(self._state(), best=False)
                self.keeper.finish()
            raise

    def _step(self, began: float) -> Verdict:
        """One optimizer step; gives what the guards said of it. began: when its samples were asked for."""
        run = self.run
        run.step += 1
        run.events.tell("step_started", run=run, step=run.step)
        reseed(run.settings.seed, run.step, run.world.replica)
        with run.phases("data"):
            run.samples, numbers = self.feed.next()
            batches = step_batches(run, run.samples, numbers, self.limit)
        totals = self.stepper.totals(batches)
        sums = self.stepper.accumulate(batches, totals)
        rate = run.optimizer.learning_rate * run.schedule.factor(run.step, run.steps)
        metrics = sums.means(run.world, totals)
        verdict, norm = self.stepper.update(rate, metrics["loss"])
        self.tokens_seen += int(metrics["tokens"])
        seconds = time.perf_counter() - began
        metrics |= {
            "grad_norm": norm,
            "lr": rate,
            "tokens_seen": self.tokens_seen,
            "seconds": seconds,
            "tokens_per_second": metrics["tokens"] / seconds,
            "memory_bytes": run.world.memory_bytes(),
            **run.noted,
        }
        run.noted.clear()
        run.metrics |= metrics
        run.events.tell("step_finished", run=run, step=run.step, metrics=metrics)
        return verdict

    def _roll_back(self) -> None:
        """Back to the last checkpoint, on with the rows that come next: those that led here are not met again."""
        before = self.feed.state()
        if not self.keeper.restore():
            raise RunFailed("a guard rolls back, but there is no checkpoint yet; set checkpoint.every")
        self._set(self.keeper.state)
        self.feed.set({**before, "pending": None})

    def _after_step(self, last: int) -> bool:
        """Evaluates, saves and hears requests to stop, at the step's edge; True where the run ends here."""
        run, every = self.run, self.run.settings.evaluate.every
        leaves = self._agree()
        ends = run.step >= last
        improved = enough = False
        self.owed = ends or bool(every and run.step % every == 0)
        try:
            if self.owed:
                with run.phases("evaluation"):
                    improved, enough = self.best.update(evaluate(run), run.step)
                self.owed = False
        except Preempted:
            leaves = True
        at_edge = run.settings.checkpoint.every and run.step % run.settings.checkpoint.every == 0
        if at_edge or improved or enough or leaves or ends:
            with run.phases("checkpoint"):
                self.keeper.save(self._state(), best=improved)
        self.left = leaves and (self.owed or not ends)
        return leaves or enough or ends

    def _agree(self) -> bool:
        """Whether some rank was asked to stop. A checkpoint that every rank has written is committed.

        Raises LeaseLost, on every rank, where a newer attempt has taken the run over.
        """
        lost = self.keeper.superseded()
        asked, written, ends = self.run.world.total([self.run.stop.requested, self.keeper.ready(), bool(lost)])
        if ends:
            raise LeaseLost(lost or "a newer attempt writes to this run's folder")
        if written == self.run.world.size:
            self.keeper.finish()
        return asked > 0

    def _end(self) -> str:
        self.keeper.finish()
        if self.left:
            return "preempted"
        return "completed" if self.run.step >= self.run.steps else "stopped"
