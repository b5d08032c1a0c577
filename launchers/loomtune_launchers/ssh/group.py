"""All hosts of one attempt: met, let go together, followed to their end, and ended where one of them fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from loomtune.errors import UserError
from loomtune_launchers.asked import Asked, say
from loomtune_launchers.ssh import faults as ssh_faults
from loomtune_launchers.ssh.hosts import LOOPBACK, Host
from loomtune_launchers.ssh.link import Link
from loomtune_launchers.ssh.remote import LAST, SLACK, beat_every

TICK = 0.2

STARTING = 30
"""Seconds beyond patience, which bounds connecting, for Python to start there: from a shared disk that may be long."""

SETTLE = 5
"""Seconds in which the others may end by themselves when one has failed, and say why in their own words."""


class Group:
    """The hosts of an attempt. patience: seconds. settled: whether the run has said itself how it ended."""

    def __init__(self, patience: float, asked: Asked, settled: Callable[[], bool]) -> None:
        self.links: list[Link] = []
        self.patience, self.asked, self.settled = patience, asked, settled
        self.cause = ""
        self.tail: list[str] = []
        self._told = 0
        self._failed: list[Link] = []
        self._stop_at = self._close_at = math.inf

    def start(self, hosts: Sequence[Host], commands: Sequence[tuple[str, ...]], order: str) -> None:
        """Connects to all at once; gives each its order."""
        for host, command in zip(hosts, commands, strict=True):
            self.links.append(Link(host, command))
            self.links[-1].order(order)

    def meet(self, commands: Sequence[tuple[str, ...]], order: dict[str, Any]) -> bool:
        """Waits for all hellos, and lets all go; False where we are asked to end meanwhile.

        Raises UserError of every host that cannot take part: none does then.
        """
        limit = self.patience + STARTING
        until = time.monotonic() + limit
        while self._awaited() and time.monotonic() < until and not self.asked.times:
            self._beat()
            time.sleep(TICK)
        if self.asked.times:
            return False
        pairs = zip(self.links, commands, strict=True)
        for link in self.links:
            link.drained() if link.code is not None else None
        faults = [ssh_faults.unreached(link, command, limit) for link, command in pairs if link.hello is None]
        hellos = [link.hello for link in self.links if link.hello is not None]
        if faults := faults or ssh_faults.together(self.links, hellos, order):
            raise UserError(*faults)
        self._go(hellos, order)
        return True

    def follow(self, grace: int) -> None:
        """Until all have ended. grace: seconds for a polite end."""
        while any(link.code is None for link in self.links):
            self._beat()
            self._hear(grace)
            self._judge(grace)
            if time.monotonic() > self._stop_at:
                self._stop(LAST)
            if time.monotonic() > self._close_at:
                self.close()
            time.sleep(TICK)
        self._judge(grace)

    def close(self) -> None:
        """Ends every connection; what runs there ends with it."""
        for link in self.links:
            link.close()

    def _awaited(self) -> bool:
        return any(link.hello is None and link.code is None for link in self.links)

    def _go(self, hellos: list[dict[str, Any]], order: dict[str, Any]) -> None:
        for i, (link, hello) in enumerate(zip(self.links, hellos, strict=True)):
            seen = hello["address"]
            link.go(
                {
                    "endpoint": endpoint(order["address"], hellos[0]["port"]),
                    "attempt": order["attempt"],
                    "hosts": i == 0,
                    "address": order["address"] if i == 0 else "" if seen in LOOPBACK else seen,
                }
            )

    def _beat(self) -> None:
        for link in self.links:
            link.beat(beat_every(self.patience))

    def _hear(self, grace: int) -> None:
        """Hands on what was asked of us: at first politely."""
        if self.asked.times > self._told:
            self._told = self.asked.times
            word = f"up to {grace} s for a last checkpoint" if self._told == 1 else "now"
            say(f"stopping {len(self.links)} hosts; {word}")
            self._stop(grace + SLACK if self._told == 1 else 0)

    def _stop(self, seconds: float) -> None:
        self._stop_at = math.inf
        self._close_at = min(self._close_at, time.monotonic() + seconds + SLACK)
        for link in self.links:
            link.stop(seconds)

    def _judge(self, grace: int) -> None:
        """Looks who has ended since; the first that failed is the cause."""
        for link in self.links:
            if link.silent(self.patience):
                link.lost = True
                link.close()
        failed = [link for link in self.links if link.code and link not in self._failed]
        for link in sorted(failed, key=lambda link: link.ended):
            self._failed.append(link)
            self._mourn(link, grace)

    def _mourn(self, link: Link, grace: int) -> None:
        link.drained()
        gone = link.lost or link.code == 255
        if self.settled() and not gone:  # its exit code says nothing new; the others are about to leave too
            self._stop_at = min(self._stop_at, time.monotonic() + grace + SLACK)
        elif not self.cause and not self._told:
            self.cause, self.tail = _cause(link, self.patience), list(link.tail)
            self._stop_at = min(self._stop_at, time.monotonic() + (0 if gone else SETTLE))


def endpoint(address: str, port: int | str) -> str:
    """As torchrun reads it: an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _cause(link: Link, patience: float) -> str:
    host = link.host.written
    if link.lost:
        return f"nothing was heard of {host} for {patience:g} s"
    if link.code == 255:
        return f"the connection to {host} was lost, or what ran there was killed"
    return f"{host} ended first, with exit code {link.code}"
