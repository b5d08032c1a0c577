"""All nodes of one start: placed on the cluster, met, followed to their end, and ended where one of them fails."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from loomtune.contracts import JobSpec
from loomtune.errors import Preempted, UserError
from loomtune_launchers import jobs, torchrun
from loomtune_launchers.asked import Asked, say
from loomtune_launchers.ray.node import Node

NAMESPACE = "loomtune"

TICK = 0.5
"""Seconds between two looks, and for which an actor waits for something to be said."""

BRIEF = 3.0
"""Seconds in which fewer nodes find room, once the patience for more has gone."""

SETTLE = 3.0
"""Seconds in which the others may end by themselves when one has failed, and say why in their own words."""

REACH = 10.0
"""Seconds in which a cluster's head must take a connection."""

SLACK = 5
"""Seconds beyond the grace in which an agent may clear away what it had to kill."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A driver of the cluster, or the one that this process is. Raises UserError where Ray or a cluster is missing."""
    try:
        import ray
    except ImportError as error:
        raise UserError.of(f"launcher=ray needs Ray: {error}", "pip install 'loomtune[ray]'") from None

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    try:
        _reach(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = f"no Ray cluster answers at launcher.address={address}: {_line(error)}"
        raise UserError.of(said, "start one (`ray start --head`), or set launcher.address=host:6379") from None
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError where nobody listens at `host:port`: Ray itself would try that for minutes."""
    import ray

    host, _, port = address.rpartition(":")
    if port.isdigit():
        at_home = host in ("localhost", "127.0.0.1")  # for which Ray takes this machine's address
        host = ray.util.get_node_ip_address() if at_home else host.strip("[]")
        socket.create_connection((host, int(port)), REACH).close()


@contextmanager
def placed(spec: JobSpec, plan: dict[str, Any], patience: float, asked: Asked) -> Iterator[tuple[Any, int]]:
    """Room for as many nodes as there is, and how many these are; given back at the end.

    plan: `bundle`, `strategy` and `name`. Raises UserError where there is not enough; Preempted where it was asked for
    before the first started.
    """
    import ray

    least, most = spec.nodes
    tries = [(most, patience), *((count, BRIEF) for count in range(most - 1, least - 1, -1))]
    for count, seconds in tries:
        group = ray.util.placement_group([plan["bundle"]] * count, plan["strategy"], name=plan["name"])
        try:
            if _ready(group, seconds, asked):
                yield group, count
                return
        finally:
            ray.util.remove_placement_group(group)
    said = f"the cluster has no room for {least} nodes of {plan['bundle']} ({plan['strategy']}); it has {_room()}"
    raise UserError.of(
        said, "ask for less (launcher.nodes, procs, cpus, gpus, memory), or set launcher.patience higher"
    )


def _ready(group: Any, seconds: float, asked: Asked) -> bool:
    began = time.monotonic()
    told = False
    while not group.wait(TICK):
        waited = time.monotonic() - began
        if asked.times:
            raise Preempted("asked to leave before there was room on the cluster; nothing was started")
        if waited > seconds:
            return False
        if waited > BRIEF and not told:
            say(f"waiting up to {seconds:g} s for room on the cluster")
            told = True
    return True


def _room() -> str:
    import ray

    wanted = ("CPU", "GPU", "memory")
    nodes = [(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    rooms = [(address, {name: there[name] for name in wanted if name in there}) for address, there in nodes]
    return "; ".join(f"{address}: {there}" for address, there in rooms)


def there(name: str) -> bool:
    """Whether a group of that name is on the cluster."""
    import ray

    with suppress(ValueError):
        table = ray.util.placement_group_table(ray.util.get_placement_group(name))
        return bool(table.get("state") != "REMOVED")
    return False


def remove(name: str) -> None:
    """Takes the group's room away, and with it its actors and what they started."""
    import ray

    with suppress(ValueError):
        ray.util.remove_placement_group(ray.util.get_placement_group(name))


@dataclass
class Member:
    """A node. code: the agent's, once it ended. lost: why nothing more is heard of it."""

    actor: Any
    name: str = "a node"
    code: int | None = None
    lost: str = ""


class Group:
    """The nodes of a start."""

    def __init__(self, spec: JobSpec, placement: Any, count: int, asked: Asked) -> None:
        self.spec, self.asked = replace(spec, nodes=(count, count)), asked
        self.members = [Member(_actor(placement, i)) for i in range(count)]
        self._told = 0
        self._stopped = False
        self._stop_at = self._end_at = math.inf

    @property
    def lost(self) -> list[str]:
        """The nodes that were lost, and why."""
        return [f"{member.name} was lost: {member.lost}" for member in self.members if member.lost]

    def meet(self, attempt: str) -> None:
        """Waits for all, and lets all go. Raises UserError of every node that does not see the run's folder."""
        run = str(self.spec.run)
        hellos = self._all([member.actor.hello.remote(run, attempt) for member in self.members])
        for member, hello in zip(self.members, hellos, strict=True):
            member.name = f"{hello['host']} ({hello['address']})"
        if blind := [member.name for member, hello in zip(self.members, hellos, strict=True) if not hello["sees"]]:
            cure = "set run.dir to a folder of a file system that all nodes share"
            raise UserError.of(f"{', '.join(blind)} does not see the run's folder {run}", cure)
        say(f"{len(self.members)} x {self.spec.procs} processes on {', '.join(member.name for member in self.members)}")
        meetings = [_meeting(hellos[0], hello, i == 0, attempt) for i, hello in enumerate(hellos)]
        job, here = jobs.text(self.spec), os.getcwd()  # noqa: PTH109 - a text, which nodes are told
        members = zip(self.members, meetings, strict=True)
        self._all([member.actor.start.remote(job, asdict(meeting), here) for member, meeting in members])

    def follow(self) -> None:
        """Until all have ended."""
        import ray

        pending = {member.actor.hear.remote(TICK): member for member in self.members}
        while pending:
            for ref in ray.wait(list(pending), timeout=TICK)[0]:
                member = pending.pop(ref)
                self._hear(member, ref)
                if member.code is None and not member.lost:
                    pending[member.actor.hear.remote(TICK)] = member
            self._mind()

    def _all(self, refs: list[Any]) -> list[Any]:
        """What all answer. Raises UserError where one cannot."""
        import ray

        try:
            return list(ray.get(refs))
        except ray.exceptions.RayError as error:
            said = f"Ray could not start a process of loomtune on a node: {_line(error)}"
            raise UserError.of(
                said, "install loomtune on every node as it is here, or through the job's runtime_env"
            ) from None

    def _hear(self, member: Member, ref: Any) -> None:
        import ray

        try:
            said, member.code = ray.get(ref)
        except ray.exceptions.ActorUnavailableError:
            time.sleep(TICK)  # Ray says by and by whether it comes back or is dead
            return
        except ray.exceptions.RayError as error:
            member.lost = _line(error)
            if not self.asked.times:  # else it may be that it was taken away on purpose
                say(f"{member.name} was lost: {member.lost}")
            return
        for errors, line in said:
            with suppress(OSError, ValueError):  # whoever read our output has gone; the run goes on
                print(line, end="", file=sys.stderr if errors else sys.stdout, flush=True)

    def _mind(self) -> None:
        """Hands on what was asked of us, and ends all where one has failed."""
        now = time.monotonic()
        if self.asked.times > self._told:
            self._told = self.asked.times
            word = f"up to {self.spec.grace} s for a last checkpoint" if self._told == 1 else "now"
            say(f"stopping {len(self.members)} nodes; {word}")
            self._stop_at = now
            self._end_at = now if self._told > 1 else math.inf
        self._stop_at = min([self._stop_at, *(now + self._patience(member) for member in self.members)])
        if now >= self._stop_at and not self._stopped:
            self._stopped = True
            self._end_at = min(self._end_at, now + self.spec.grace + SLACK)
            self._tell("stop")
        if now >= self._end_at:
            self._end_at = math.inf
            self._tell("end")

    def _patience(self, member: Member) -> float:
        """Seconds that the others have left because of this one. What has said how it ended leaves everywhere."""
        if not member.lost and not member.code:
            return math.inf
        settled = member.code == Preempted.exit_code or (self.spec.run / "result.json").exists()
        return self.spec.grace + SLACK if settled and not member.lost else SETTLE

    def _tell(self, word: str) -> None:
        for member in self.members:
            if member.code is None and not member.lost:
                getattr(member.actor, word).remote()


def _actor(placement: Any, index: int) -> Any:
    """A process of Ray's that has all of a bundle, so that the bundle's devices are what it sees."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = placement.bundle_specs[index]
    options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "memory": bundle.get("memory")}
    strategy = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=index)
    return ray.remote(Node).options(scheduling_strategy=strategy, max_restarts=0, **options).remote()


def _meeting(first: dict[str, Any], hello: dict[str, Any], hosts: bool, attempt: str) -> torchrun.Meeting:
    host = f"[{first['address']}]" if ":" in first["address"] else first["address"]
    return torchrun.Meeting(f"{host}:{first['port']}", attempt, hosts, hello["address"])


def _line(error: BaseException) -> str:
    """The line of an error that says most: Ray's begin with one that says nothing, and then tell much."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines[1:] if re.search("because|died|dead|Error", line)), lines[0])
