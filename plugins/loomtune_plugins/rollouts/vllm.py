"""Generation by vLLM's own server, which knows nothing of loomtune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Completion, Role, Rollout, Sampling
from loomtune.errors import RunFailed, UserError
from loomtune_plugins.rollouts.vllm_settings import VllmSettings, faults

if TYPE_CHECKING:
    from loomtune.world import World
    from loomtune_plugins.rollouts.vllm_serving import Serving
    from loomtune_plugins.rollouts.vllm_waiting import Task

AGAIN = 2
"""How often a rollout is asked for anew whose servers turn out to have had other weights."""


class Vllm(Rollout):
    """Pushes weights that changed, asks servers for this rank's completions, and lets training go on meanwhile.

    What is drawn is vLLM's affair: a prompt's key is its seed there, but its random numbers, and how it rounds in a
    batch, are not those of `huggingface`.
    apart: mean and largest difference, in nats, up to which its log-probabilities are taken for ours.
    """

    def __init__(self, settings: VllmSettings) -> None:
        if found := list(faults(settings)):
            raise UserError(*found)
        self.apart = (settings.apart, 40 * settings.apart)
        self._settings = settings
        self._serving: Serving | None = None
        self._under_way: Round | None = None
        self._leads = False

    def generate(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> list[Completion]:
        """Completions of this rank's prompts, in order."""
        return self.begin(role, prompts, keys, sampling, world)()

    def begin(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> Callable[[], list[Completion]]:
        """Pushes weights where they changed, and asks in a thread."""
        from loomtune_plugins.rollouts.vllm_serving import Serving

        assert role.adapter, "servers have the adapter on"
        assert all(prompts), "a prompt needs a token to go on from"
        if self._under_way is not None:
            self._under_way.end()
        self._serving, self._leads = self._serving or Serving(self._settings), world.leads
        self._serving.ready(role.engine, world, self.heed)
        self._under_way = Round(self, self._serving, role, prompts, keys, sampling, world)
        return self._under_way.end

    def close(self) -> None:
        """Hangs up, and takes away what was made for servers."""
        if self._under_way is not None:
            self._under_way.cancel()
        if self._serving is not None:
            self._serving.close(self._leads)


class Round:
    """One rollout: begun at once, ended once, however often that is asked."""

    def __init__(
        self,
        rollout: Vllm,
        serving: Serving,
        role: Role,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        sampling: Sampling,
        world: World,
    ) -> None:
        self._rollout, self._serving, self._engine, self._world = rollout, serving, role.engine, world
        self._updates = role.engine.updates
        self._prompts, self._keys, self._sampling = (prompts, keys, sampling) if world.counts else ((), (), sampling)
        self._made: list[Completion] | None = None
        self._task = self._ask()

    def _ask(self) -> Task:
        from loomtune_plugins.rollouts.vllm_asking import ask_all
        from loomtune_plugins.rollouts.vllm_waiting import Task

        self._servers = servers = self._serving.connect()
        turned = servers[self._world.rank % len(servers) :] + servers[: self._world.rank % len(servers)]
        prompts, parallel = self._prompts, self._rollout._settings.parallel

        def work() -> list[Completion]:
            asked = self._serving.asked(self._sampling, prompts)
            return ask_all(turned, asked, prompts, self._keys, parallel)

        return Task(work)

    def cancel(self) -> None:
        """Hangs up on the servers."""
        from loomtune_plugins.rollouts.vllm_http import hang_up

        hang_up(self._servers)

    def end(self) -> list[Completion]:
        """Waits for the completions of all ranks' prompts, and gives this rank's. Called on every rank."""
        if self._made is None:
            self._made = self._shared(self._waited())
        return self._made

    def _waited(self) -> list[Completion]:
        from loomtune_plugins.rollouts.vllm_waiting import Stale, together

        heed = self._rollout.heed
        for again in range(AGAIN, -1, -1):
            try:
                made: list[Completion] = together(self._world, heed, self._task, self.cancel)
                self._serving.still(self._world, heed)
                return made
            except Stale as error:
                if not again or self._engine.updates != self._updates:
                    cure = "give each run servers of its own; where one was started anew, resume the run"
                    raise RunFailed(f"completions came of other weights: {error}\n    cure: {cure}") from error
                self._serving.ready(self._engine, self._world, heed, anew=True)
                self._task = self._ask()
        raise AssertionError("the last try returns or raises")

    def _shared(self, made: list[Completion]) -> list[Completion]:
        """Ranks that have the same prompts have them asked for by one of them."""
        if self._world.replicas == self._world.size:
            return made
        said = self._world.gather((self._world.replica, made) if self._world.counts else None)
        return next(part[1] for part in said if part is not None and part[0] == self._world.replica)
