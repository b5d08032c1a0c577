"""What a scheduler starts on each node: `python -m loomtune_launchers.node JOB HOST:PORT ATTEMPT`.

JOB is the file that `jobs.text` made. The process becomes torchrun's agent, with the environment that the job is given.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from loomtune_launchers import jobs, torchrun


def main(arguments: list[str]) -> None:
    """Becomes the node's agent."""
    job, endpoint, attempt = arguments
    spec = jobs.read(Path(job).read_text())
    command = torchrun.command(spec, torchrun.Meeting(endpoint, attempt))
    os.execve(command[0], command, torchrun.environment(spec))


if __name__ == "__main__":
    main(sys.argv[1:])
