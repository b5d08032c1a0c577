"""The hosts of a run, and which of them was lost."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch.distributed as dist

from loomtune.errors import PeerLost
from loomtune.world import TIMEOUT

_COLLECTIVE = re.compile("gloo|nccl", re.I)
_CLOSED = re.compile("closed by|reset by peer|broken pipe|remote|failed to recv|connection was|refused|aborted", re.I)
_SILENT = re.compile("timed? ?out|connectFullMesh|no route|unreachable", re.I)

_PROBE = 3.0
"""Seconds in which a host that is there answers, if only by a refusal."""

_ADVICE = """cause: its process or its host ended or hangs, or a link is cut; what it said last is in its own log
    cure: start the run again, and it goes on from its last checkpoint; where a step may take longer than that, set
    LOOMTUNE_TIMEOUT_MINUTES on every host"""


class Peer(NamedTuple):
    """A rank's host, and the address that others see it under; empty where it is not known."""

    host: str
    address: str

    @classmethod
    def me(cls) -> Peer:
        """This process'. Its address is the one that it would write to the first rank from."""
        address = ""
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
            unsent.connect((os.environ.get("MASTER_ADDR", ""), 1))
            address = unsent.getsockname()[0]
        return cls(os.uname().nodename, address)

    def answers(self) -> bool:
        """Whether the host can be reached; True where that cannot be asked."""
        try:
            socket.create_connection((self.address, 1), _PROBE).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return not self.address
        return True


@contextmanager
def watched(peers: Sequence[Peer] = ()) -> Iterator[None]:
    """Within, a collective that fails because a peer is gone or silent raises PeerLost. peers: of each rank."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        closed = _CLOSED.search(said)
        collective = isinstance(error, dist.DistError) or _COLLECTIVE.search(said)
        if not (collective and (closed or _SILENT.search(said))):
            raise
        raise lost(_who(said, peers), said) from error


def lost(who: str, said: str) -> PeerLost:
    """The error that names who is gone. said: by the library that noticed."""
    limit = f"no answer within LOOMTUNE_TIMEOUT_MINUTES={TIMEOUT.total_seconds() / 60:g}"
    what = "its connection was closed" if _CLOSED.search(said) else limit
    return PeerLost(f"lost {who}: {what}\n    {_ADVICE}\n    {said}")


def _who(said: str, peers: Sequence[Peer]) -> str:
    """The ranks of hosts that the message names, or that cannot be reached; never this one."""
    me = dist.get_rank() if dist.is_initialized() else -1
    ranks: dict[Peer, list[str]] = {}
    for rank, peer in enumerate(peers):
        if rank != me:
            ranks.setdefault(peer, []).append(str(rank))
    named, how = [peer for peer in ranks if peer.address and f"[{peer.address}]" in said], ""
    if ranks and not named:
        with ThreadPoolExecutor(min(256, len(ranks))) as pool:
            named = [peer for peer, there in zip(ranks, pool.map(Peer.answers, ranks), strict=True) if not there]
        how = ", which cannot be reached"
    if not named:
        return "another rank" + ("; every host can be reached" if ranks else "")
    return "; ".join(f"rank {', '.join(ranks[peer])} on {peer.host} ({peer.address})" for peer in named) + how
