"""A process beside this one: `python -m loomtune.beside FUNCTION PIPE`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pkgutil import resolve_name

from loomtune.signals import StopRequest, die_with_parent


class Beside:
    """Runs a function with the other end of a pipe; it knows what it is sent, and ends with this process.

    It is a program of its own and no fork, which threads (of torch, of tokenizers) do not survive; nor does it run the
    user's script again, as those of `multiprocessing` do. function: `package.module:name`.
    """

    def __init__(self, function: str) -> None:
        self.pipe, there = Pipe()
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loomtune.beside", function, str(there.fileno())],
            pass_fds=[there.fileno()],
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,
        )
        there.close()

    def worked(self) -> float:
        """Seconds of CPU time that it has spent, whatever on: by that one that hangs is told. Linux only."""
        return time.clock_gettime(~self.process.pid << 3 | 2)  # the kernel's MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)

    def close(self) -> None:
        """Ends the process at once: it keeps nothing that this one does not have."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Entry of the process. Requests to stop are for the one beside it, and its end is seen by the pipe."""
    die_with_parent()
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with Connection(int(sys.argv[2])) as pipe, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        resolve_name(sys.argv[1])(pipe)


if __name__ == "__main__":
    main()
