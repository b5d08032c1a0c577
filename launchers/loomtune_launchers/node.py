"""What Slurm starts on each node: `python -m loomtune_launchers.node JOB HOST:PORT ATTEMPT [NODES]`.

JOB is the file that `jobs.text` made. The process becomes torchrun's agent, with the environment that the job is given.
NODES: how many have come; nobody then waits for more.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loomtune_launchers import jobs, torchrun


def main(arguments: list[str]) -> None:
    """Becomes the node's agent."""
    job, endpoint, attempt, *come = arguments
    spec = jobs.read(Path(job).read_text())
    if come:
        spec = replace(spec, nodes=(int(come[0]), int(come[0])))
    command = torchrun.command(spec, meeting(endpoint, attempt, os.environ))
    os.execve(command[0], command, torchrun.environment(spec))


def meeting(endpoint: str, attempt: str, said: Mapping[str, str]) -> torchrun.Meeting:
    """Slurm's word for who is first, and for this node's name: torch would compare host names, and give others the
    name that this node has for itself, such as `localhost`. said: the variables of a task."""
    here, name = said.get("SLURM_NODEID"), said.get("SLURMD_NODENAME", "")
    return torchrun.Meeting(endpoint, attempt, here == "0" if here else None, name if _known(name) else "")


def _known(name: str) -> bool:
    try:
        return bool(name) and bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
