"""torchrun where a job runs elsewhere: `python -m loomtune_launchers.there RUN torchrun-arguments...`.

It adds two things to torchrun. It ends with the exit code of the rank that failed first, where torchrun says 1 for
all, so that an engine can tell a preempted run (75) from a mistake (2). And the first node prints the run's result, the
one way in which it reaches those who see no more of the job than its output. Without arguments it takes them, and
further variables of the environment, from `LOOMTUNE_PACKED`, where an engine has only a shell to give them by.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from loomtune.errors import Preempted

MARK = "loomtune-result "
"""Before the result, as JSON, on a line of the first node's output."""

PACKED = "LOOMTUNE_PACKED"

PATIENCE = 10.0
"""Seconds for a result that a rank on another node writes; one that failed may leave none."""


def pack(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Both as letters, digits and `+/=`, which every shell and every template leaves alone."""
    said = json.dumps({"arguments": list(arguments), "environment": dict(environment)})
    return base64.b64encode(said.encode()).decode()


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun to its end."""
    if not arguments:
        job = json.loads(base64.b64decode(os.environ.pop(PACKED)))
        os.environ.update(job["environment"])
        arguments = job["arguments"]
    result = Path(arguments[0]) / "result.json"
    before = _stamp(result)
    code = _torchrun(list(arguments[1:]))
    if os.environ.get("PET_NODE_RANK", "0") == "0":
        _print(result, before, PATIENCE if code in (0, Preempted.exit_code) else 0)
    return code


def _torchrun(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        ended = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
        print(f"loomtune: rank {rank} ended first here, with {ended}", file=sys.stderr, flush=True)  # noqa: T201
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:  # the ranks had it too, saved and left
        return Preempted.exit_code
    return 0


def _print(result: Path, before: int, patience: float) -> None:
    """The result, where this start left one: another start's is of no concern."""
    until = time.monotonic() + patience
    while _stamp(result) in (before, 0):
        if time.monotonic() > until:
            return
        time.sleep(0.2)
    print(MARK + json.dumps(json.loads(result.read_text())), flush=True)  # noqa: T201


def _stamp(path: Path) -> int:
    """When a file was last written, 0 where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
