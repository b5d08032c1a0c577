"""Generation on ranks that train nothing: how those that train hand it over, and how the others serve them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Completion, Role, Rollout, Sampling
from loomtune.errors import Fault, PeerLost, UserError

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from loomtune.world import World
    from loomtune_plugins.rollouts.line import Line
    from loomtune_plugins.rollouts.links import Links

POLL = 0.25
"""Seconds between two looks for completions, each of which all ranks that train take together."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank aside is to complete. names: of the weights that come first, in their order."""

    prompts: Sequence[Sequence[int]]
    keys: Sequence[int]
    sampling: Sampling
    names: Sequence[str]


class Dismissed(Exception):
    """Training is over, whatever is being generated."""


class Aside(Rollout):
    """An engine that generates in the training process, or by the same code on the world's last ranks.

    What it draws depends on keys alone, so it is the same on either. What is trained is sent before a generation where
    it has changed; all else, those aside have read from the model's files as training has.
    """

    def __init__(self, ranks: int, ahead: int) -> None:
        """Raises UserError for what makes no sense."""
        if faults := list(_faults(ranks, ahead)):
            raise UserError(*faults)
        self.ranks, self.ahead = ranks, ahead
        self._names: list[str] = []
        self._sent = -1
        self._under_way: Pending | None = None

    def connect(self, store: dist.Store, rank: int, names: Sequence[str]) -> Links:
        from loomtune_plugins.rollouts.links import Links

        return Links(store, rank, names, self.ranks)

    def begin(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> Callable[[], list[Completion]]:
        """Hands the prompts of all ranks to those aside, where there are any, with the weights as they are now."""
        links: Links | None = world.aside
        if links is None:
            return super().begin(role, prompts, keys, sampling, world)
        if self._under_way:
            self._under_way.ended()
        shares = dict(world.gather((world.replica, (prompts, keys))))  # ranks that share their rows ask for the same
        asked = [one for replica in sorted(shares) for one in zip(*shares[replica], strict=True)]
        self._send(links, role, asked, sampling, world)
        pending = self._under_way = Pending(self, links, world, len(asked))
        first = sum(len(share[0]) for replica, share in shares.items() if replica < world.replica)
        return lambda: pending.ended()[first : first + len(prompts)]

    def _send(
        self, links: Links, role: Role, asked: Sequence[tuple[Any, int]], sampling: Sampling, world: World
    ) -> None:
        """Gives each of those aside its share of all prompts, and the weights that it does not have yet."""
        if not self._names:
            theirs = Pending(self, links, world).said()[0]  # which they say once they are ready
            self._names = [name for name in role.engine.trained() if name in theirs]
        names = self._names if role.engine.updates != self._sent else []
        if world.leads:
            parts = [asked[i :: self.ranks] for i in range(self.ranks)]
            links.say([Job([p for p, _ in part], [k for _, k in part], sampling, names) for part in parts])
        if names:
            links.send(role.engine.stream_weights(set(names).__contains__), names, world)
        self._sent = role.engine.updates

    def serve(self, role: Role, world: World) -> None:
        """Until training ends. What a generation fails of is told to training, which then fails of it too."""
        (line,) = world.aside.lines
        self.heed = lambda: _look(line)
        with suppress(Dismissed), line.serves():
            job = _told(line, list(role.engine.trained()))
            while job is not None:
                job = _told(line, self._done(job, role, world))

    def _done(self, job: Job, role: Role, world: World) -> list[Completion]:
        """What a job asks for. Where that fails, training is told before this rank fails."""
        try:
            if job.names:
                role.engine.load(Arriving(world.aside, job.names, role.engine.trained()), optimizer=False)
            return self.generate(role, job.prompts, job.keys, job.sampling, world)
        except (Dismissed, PeerLost):
            raise
        except Exception as error:
            from loomtune_plugins.rollouts.links import Failed

            _told(world.aside.lines[0], Failed(f"{type(error).__name__}: {error}"))
            raise

    def close(self) -> None:
        """Raises PeerLost where a rank aside was lost since it was last heard of."""
        if self._under_way:
            self._under_way.links.check()


class Pending:
    """What those aside were asked, or will say by themselves; every rank that trains waits for it together."""

    def __init__(self, engine: Aside, links: Links, world: World, count: int = 0) -> None:
        """count: of the prompts of a generation."""
        self.links = links
        self._engine, self._world, self._count = engine, world, count
        self._completions: list[Completion] | None = None

    def said(self) -> list[Any]:
        """What each of those aside says, on every rank. Where it raises Preempted, nothing was heard yet."""
        world, links = self._world, self.links
        while not world.broadcast(links.ready(POLL) if world.leads else None):
            self._engine.heed()
        said: list[Any] = world.broadcast(links.hear() if world.leads else None)
        return said

    def ended(self) -> list[Completion]:
        """All completions, in the order of the prompts. May be asked again, after Preempted too."""
        if self._completions is None:
            completions: list[Any] = [None] * self._count
            parts = self.said()
            for i, part in enumerate(parts):
                completions[i :: len(parts)] = part
            self._completions = completions
        return self._completions


class Arriving:
    """Weights as they come, for an engine to load (`StateReader`)."""

    def __init__(self, links: Links, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._links, self._names, self._shapes = links, iter(names), shapes
        self._early: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: str, where: Any) -> Tensor:
        """A parameter, whole. Those that come before it are kept until they are asked for."""
        while name not in self._early:
            came = next(self._names)
            self._early[came] = self._links.receive(self._shapes[came])
        return self._early.pop(name)


def _told(line: Line, thing: Any) -> Job | None:
    """Says something, and gives what training says next: a job, or nothing, as it may before it has heard."""
    line.say(thing, lambda: line.hears(0))
    job: Job | None = line.hear()
    return job


def _look(line: Line) -> None:
    """While this rank generates, training has but one thing to say."""
    if line.hears(0):
        raise Dismissed


def _faults(ranks: int, ahead: int) -> Any:
    if ranks < 0:
        yield Fault(f"rollout.ranks={ranks} is negative", "set rollout.ranks to 0 or more")
    if ahead not in (0, 1):
        yield Fault(f"rollout.ahead={ahead}: one batch at most is begun ahead", "set rollout.ahead to 0 or 1")
    if ahead and not ranks:
        what = "rollout.ahead=1 gains nothing where training generates itself: it would only learn of older completions"
        yield Fault(what, "set rollout.ranks=1 or more, or rollout.ahead=0")
