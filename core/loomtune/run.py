"""A run as plugins see it: its plan, its world, its parts, and where it stands."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.errors import Preempted, UserError
from loomtune.phases import Phases
from loomtune.placement import row_width
from loomtune.signals import StopRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from loomtune import contracts as c
    from loomtune.contracts.sharding import StateReader
    from loomtune.events import Events
    from loomtune.plan import Plan
    from loomtune.samplers import Sampler
    from loomtune.samples import Samples
    from loomtune.settings import Settings
    from loomtune.world import World


@dataclass(kw_only=True)
class Run:
    """One attempt at a plan, on one rank.

    settings: the root settings, typed. plan: all of it, with the axes. roles: filled before `model_ready`.
    splits: tokenised samples by split. sampler: which of `train` make a step. steps: of the whole run; step: done.
    token_budget: tokens, with padding, of a micro-batch where `batch.micro=auto`.
    virtual_tokens: what the adapter puts before each row.
    stop: whether this rank was asked to leave; what takes long asks all of them between its pieces (`heed`).
    metrics: those of the last step and the last evaluation. noted: those that join the step's that ends next, equal on
    all ranks unless a clock or an allocator gave them.
    phases: what is being done, for those who measure. samples: the current step's, on all ranks together.
    draw: gives the rows that come next, a `batch.size` of them, while the objective makes experience.
    """

    plan: Plan
    settings: Settings
    folder: Path
    world: World
    events: Events
    model: c.Model
    tokenizer: c.Tokenizer
    data: c.Data
    objective: c.Objective
    optimizer: c.Optimizer
    schedule: c.Schedule
    kernel: c.Kernel
    rollout: c.Rollout | None
    evaluators: Mapping[str, c.Evaluator]
    rewards: Mapping[str, c.Reward] = field(default_factory=dict)
    guards: Sequence[c.Guard]
    trackers: Mapping[str, c.Tracker]
    splits: Mapping[str, Samples]
    sampler: Sampler
    steps: int
    attempt: str = ""
    token_budget: int = 0
    virtual_tokens: int = 0
    roles: dict[str, c.Role] = field(default_factory=dict)
    step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    noted: dict[str, float] = field(default_factory=dict)
    samples: Sequence[c.Sample] = ()
    draw: Callable[[], list[c.Drawn]] = list
    stop: StopRequest = field(default_factory=StopRequest)
    phases: Phases = field(default_factory=Phases)
    started: float = field(default_factory=time.time)

    @property
    def policy(self) -> c.Role:
        """The trained role."""
        return self.roles["policy"]

    @property
    def max_length(self) -> int:
        """Tokens of the longest chain of a sample's segments, and of a packed row."""
        return row_width(self.settings, self.model, self.virtual_tokens)

    def trained_engines(self) -> list[c.Engine]:
        """The engines that take steps, each once, in the order of the roles."""
        return list(dict.fromkeys(role.engine for role in self.roles.values() if role.trained))

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Around one micro-batch: after the last, gradients of every trained engine are reduced over ranks."""
        stack = ExitStack()
        for engine in self.trained_engines():
            stack.enter_context(engine.accumulating(last))
        return stack

    def heed(self, said: str = "asked to leave during an evaluation, which begins anew") -> None:
        """Raises Preempted, on every rank, where one was asked to leave. Every rank calls it, equally often: between
        the pieces of what takes long and can be made again."""
        if self.world.total([self.stop.requested])[0]:
            raise Preempted(said)
        for guard in self.guards:
            guard.waits()  # every rank was heard of

    def tell_once(self, message: str) -> None:
        """Says something to the user, on one rank."""
        if self.world.leads:
            print(f"loomtune: {message}", file=sys.stderr, flush=True)  # noqa: T201

    def rows(self, split: str, limit: int = 0) -> list[c.Row]:
        """Rows of a split as the data's plugin gives them, at most `limit` (0: all)."""
        return list(islice(self.data.rows(split), limit or None))

    def batches(self, split: str, limit: int = 0) -> list[c.Batch]:
        """This rank's share of a split's samples as micro-batches on the device; every rank gets equally many."""
        from loomtune.batching import evaluation_batches

        if split == "train" and self.data.window:
            raise UserError.of("training rows stream and are never there together", "measure on another split")
        return evaluation_batches(self, split, limit)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: c.Sampling) -> list[list[int]]:
        """Tokens that complete *all* prompts; what is drawn depends on the global state that the loop sets."""
        from loomtune.seeds import derive

        seed = self.world.broadcast(random.getrandbits(62))
        keys = [derive(seed, number) for number in range(len(prompts))]
        return [list(one.tokens) for one in self.begin(prompts, keys, sampling)()]

    def begin(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: c.Sampling
    ) -> Callable[[], list[c.Completion]]:
        """Begins completions of *all* prompts (the same list on every rank), shared out over ranks; see `Rollout`.

        Gives what waits for them and gathers them, in order; called on every rank too.
        """
        assert self.rollout is not None, "preflight refuses what generates without a rollout engine"
        world, longest = self.world, self.model.context() - self.virtual_tokens
        sampling = replace(sampling, max_length=min(sampling.max_length or longest, longest))
        mine = slice(world.replica, None, world.replicas)
        self.rollout.heed = self.heed
        begun = self.rollout.begin(self.policy, prompts[mine], keys[mine], sampling, world)

        def end() -> list[c.Completion]:
            completions: list[Any] = [None] * len(prompts)
            for replica, part in world.gather((world.replica, begun())):
                completions[replica :: world.replicas] = part
            return completions

        return end

    def read(
        self, samples: Sequence[c.Sample], reader: Callable[[Mapping[str, c.Role], c.Batch], Tensor]
    ) -> list[NDArray[np.float32]]:
        """What roles say of the samples' targets now, without gradient: `(targets, ...)` for each sample.

        samples: all of them, the same list on every rank; ranks share them out. reader: from the roles and a batch to
        `(targets, ...)`, called on every rank equally often. Raises Preempted where a rank is asked to leave.
        """
        from loomtune.reading import read

        return read(self, samples, lambda batch: reader(self.roles, batch))

    def trained_by(self, checkpoint: Path) -> tuple[StateReader, dict[str, tuple[int, ...]]]:
        """What another run's policy has learned until a checkpoint, and the whole shapes by name.

        Collective: ranks share the comparing of digests. Nothing is read before it is asked for.
        """
        from loomtune.checkpoint import Reader

        reader = Reader(checkpoint, self.world)
        index = reader.manifest.index.items()
        shapes = {name: entry.shape for (role, name, what), entry in index if (role, what) == ("policy", "weight")}
        return reader.read("policy"), shapes

    def losses(self, result: c.LossSums, totals: c.Totals) -> list[tuple[c.Engine, Tensor]]:
        """One scalar for each trained engine: its terms, each divided by its weight in the whole step."""
        losses: dict[c.Engine, Tensor] = {}
        for term, value in result.terms.items():
            engine = self.roles[self.objective.terms()[term]].engine
            part = value / totals[term] if totals[term] else value * 0.0
            losses[engine] = losses[engine] + part if engine in losses else part
        return list(losses.items())
