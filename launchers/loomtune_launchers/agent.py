"""torchrun as launchers start it: its own agent, with a short word in place of its report when a rank fails.

`python -m loomtune_launchers.agent LOGS torchrun-arguments...`: LOGS gets what ranks print, but for the node's first.
"""

from __future__ import annotations

import sys
from pathlib import Path

TAIL = 15


def main(arguments: list[str]) -> int:
    """Runs torchrun to its end; gives the exit code of the rank that failed first."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logs, *rest = arguments
    try:
        torchrun(["--log-dir", logs, *rest])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        ended = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
        print(f"loomtune: rank {rank} ended first, with {ended}", file=sys.stderr)  # noqa: T201
        _show(Path(logs), failure.local_rank)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        return 1
    return 0


def _show(logs: Path, local_rank: int) -> None:
    """The end of what a redirected rank said; the node's first rank spoke on the terminal itself."""
    written = sorted(logs.rglob(f"{local_rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    for path in written[-1:]:
        lines = path.read_text(errors="replace").splitlines()[-TAIL:]
        print("\n".join([*lines, f"loomtune: all of it is in {path}"]), file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
