"""The one place where torchrun's command and the environment of a job are made."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from loomtune.contracts import JobSpec

SCRUBBED = ("TORCHELASTIC_", "PET_", "SLURM_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SCRUBBED_NAMES = ("RANK", "WORLD_SIZE", "LOOMTUNE_PARENT", "LOOMTUNE_JOB", "LOOMTUNE_PACKED", "LOOMTUNE_HEARTBEATS")
"""What an outer launcher left in the environment, which torchrun or the ranks would take for theirs."""

REPLACEABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torch 2.13: without this a replaced process cannot join again and restarts mostly fail."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the agents of several nodes find each other.

    endpoint: host and port of one of them. attempt: the same on all, and of this start alone.
    hosts: whether it is this node's; None: torch compares names. address: by which the others reach this node; empty:
    its host's name.
    """

    endpoint: str
    attempt: str
    hosts: bool | None = None
    address: str = ""


def command(spec: JobSpec, meeting: Meeting | None = None, python: str = sys.executable) -> tuple[str, ...]:
    """What a node runs. One process alone needs no rendezvous: it is started by itself."""
    worker = ("-m", spec.module, *spec.arguments)
    if meeting is None and spec.procs == 1 and spec.nodes == (1, 1) and not spec.restarts:
        return (python, *worker)
    attempt = meeting.attempt if meeting else "auto"
    return (python, "-m", "loomtune_launchers.agent", str(spec.run), attempt, *arguments(spec, meeting), *worker)


def arguments(spec: JobSpec, meeting: Meeting | None) -> tuple[str, ...]:
    """torchrun's own, which stand before the module. meeting: None for a group on one node."""
    group = [f"--nproc-per-node={spec.procs}", f"--max-restarts={spec.restarts}", f"--shutdown-timeout={spec.grace}"]
    if meeting is None:
        return ("--standalone", *group)
    least, most = spec.nodes
    met = [f"--rdzv-endpoint={meeting.endpoint}", f"--rdzv-id={meeting.attempt}", "--rdzv-backend=c10d"]
    met += [f"--rdzv-conf=is_host={str(meeting.hosts).lower()}"] if meeting.hosts is not None else []
    met += [f"--local-addr={meeting.address}"] if meeting.address else []
    return (f"--nnodes={least}:{most}", *met, *group)


def environment(spec: JobSpec, outer: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the job: the outer one without what belongs to another job, and the spec's own."""
    kept = {
        name: value
        for name, value in (os.environ if outer is None else outer).items()
        if not name.startswith(SCRUBBED) and name not in SCRUBBED_NAMES
    }
    return {**kept, **REPLACEABLE, **spec.environment}
