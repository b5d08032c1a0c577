"""What a run's servers have: found out at the first rollout, and pushed anew when the weights changed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

from loomtune.contracts import Engine, Sampling
from loomtune.errors import UserError
from loomtune.world import World
from loomtune_plugins.rollouts.vllm_asking import Asked
from loomtune_plugins.rollouts.vllm_http import Server, hang_up
from loomtune_plugins.rollouts.vllm_meeting import Met, meet, settled, suits
from loomtune_plugins.rollouts.vllm_nccl import NcclPush
from loomtune_plugins.rollouts.vllm_pushing import AdapterPush, DiskPush, Push, at_all, serves_adapter
from loomtune_plugins.rollouts.vllm_settings import VllmSettings, all_here
from loomtune_plugins.rollouts.vllm_waiting import Stale, Task, together

Heed = Callable[[], None]


class Serving:
    """The servers of one run. Methods but `asked` are called on every rank; rank 0 alone speaks with servers in them.

    A version names the weights of one push, which no other run's do.
    """

    def __init__(self, settings: VllmSettings) -> None:
        self.settings = settings
        self._met: list[Met] = []
        self._push: Push | None = None
        self._has: tuple[Engine, int] | None = None
        self._run, self._pushes = f"loomtune-{uuid4().hex[:8]}", 0
        self._model = self._version = self._temporary = ""

    def connect(self) -> list[Server]:
        """For one piece of work alone, which may hang up on all of them."""
        return [Server(url, self.settings.patience) for url in self.settings.urls]

    def ready(self, engine: Engine, world: World, heed: Heed, *, anew: bool = False) -> None:
        """Sees to it that servers have the weights as they are now. anew: whatever they were given.

        Raises UserError, RunFailed or Stale, the same on every rank.
        """
        if not self._met:
            model = engine.spec.model
            met = self._led(world, heed, lambda servers: at_all(servers, lambda server: meet(server, model)))
            self._met, self._run = world.broadcast((met, self._run))
            self._push = self._chosen(engine, world)
        kept = not anew and self._has is not None and self._has == (engine, engine.updates)
        if not (kept and world.broadcast(self._led(world, heed, self._settled))):
            self._give(engine, world, heed)
            self._has = (engine, engine.updates)

    def _led(self, world: World, heed: Heed, work: Callable[[list[Server]], object]) -> object:
        """What rank 0 does with the servers while the others wait: its result, and None elsewhere."""
        servers = self.connect()
        task = Task((lambda: work(servers)) if world.leads else (lambda: None))
        return together(world, heed, task, partial(hang_up, servers))

    def _settled(self, servers: list[Server]) -> bool:
        """Whether no server has other weights, as one that was started anew has."""
        assert self._push is not None
        return not self._push.counts or all(found == self._version for found in at_all(servers, settled))

    def still(self, world: World, heed: Heed) -> None:
        """Raises Stale where a server has other weights by now than it was given."""
        if not world.broadcast(self._led(world, heed, self._settled)):
            raise Stale("a server has other weights than this run gave it")

    def _give(self, engine: Engine, world: World, heed: Heed) -> None:
        push = self._push
        assert push is not None
        self._pushes += 1
        self._version, self._has = f"{self._run}-{self._pushes}", None
        self._led(world, heed, lambda servers: push.prepare(servers, self._version))
        error = push.stream(engine, world, self._version)

        def tell(servers: list[Server]) -> str:
            if error is not None:
                raise error
            return push.tell(servers, self._version)

        self._model = world.broadcast(self._led(world, heed, tell))

    def _chosen(self, engine: Engine, world: World) -> Push:
        """The way of the weights. Raises UserError where there is none, on every rank alike."""
        alone = serves_adapter(engine)
        way = self.settings.push
        if way == "auto":
            way = "adapter" if alone else self._met[0].backend or "disk"
        if way == "adapter":
            if not alone:
                what = "rollout.push=adapter, but the base's own weights are trained"
                raise UserError.of(what, "set rollout.push=auto, or adapter=lora")
            return AdapterPush(self._met, self._folder(world))
        if way == "nccl":
            return NcclPush(self._met, world, self.settings.patience)
        if way == "disk":
            return DiskPush(self._met, self._folder(world))
        cure = 'start it with --weight-transfer-config \'{"backend": "nccl"}\', or without, or set rollout.push=disk'
        raise UserError.of(f"a server is set to take weights by {way}, which is not known here", cure)

    def _folder(self, world: World) -> Path:
        if self.settings.folder:
            return Path(self.settings.folder)
        if not all_here(self.settings.urls):
            what = "weights go through a folder, and servers on other machines must see it"
            cure = "set rollout.folder to one that they see under the same name"
            raise UserError.of(what, f"{cure}, or rollout.push=nccl for full weights")
        if world.leads:
            self._temporary = tempfile.mkdtemp(prefix="loomtune-vllm-")
        return Path(world.broadcast(self._temporary))

    def asked(self, sampling: Sampling, prompts: Sequence[Sequence[int]]) -> Asked:
        """What this rank's requests have in common. Raises UserError where a server cannot serve them."""
        asked = Asked(self._model, sampling, True, self._version if self._push and self._push.counts else "")
        longest = max((len(prompt) + asked.room(prompt) for prompt in prompts if asked.room(prompt) > 0), default=0)
        return replace(asked, said=suits(self.connect(), self._met, sampling, longest))

    def close(self, world_leads: bool) -> None:
        """Takes away what was made for servers; what they do not answer now is left."""
        if world_leads and self._push is not None:
            self._push.close(self.connect())
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)
