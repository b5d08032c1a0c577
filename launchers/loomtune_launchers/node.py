"""What a scheduler starts on each node: `python -m loomtune_launchers.node JOB HOST:PORT ATTEMPT [NODES]`.

JOB is the file that `jobs.text` made. The process becomes torchrun's agent, with the environment that the job is given.
NODES: how many have come, where the scheduler knows; nobody then waits for more.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from loomtune_launchers import jobs, torchrun


def main(arguments: list[str]) -> None:
    """Becomes the node's agent."""
    job, endpoint, attempt, *come = arguments
    spec = jobs.read(Path(job).read_text())
    if come:
        spec = replace(spec, nodes=(int(come[0]), int(come[0])))
    command = torchrun.command(spec, torchrun.Meeting(endpoint, attempt))
    os.execve(command[0], command, torchrun.environment(spec))


if __name__ == "__main__":
    main(sys.argv[1:])
