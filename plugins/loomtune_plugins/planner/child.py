"""`python -m loomtune_plugins.planner.child`: rehearses in a process of its own, for those that import no torch.

On stdin JSON: `plan` (the text of a run.yaml), `processes`, and, where they are not the usual ones, `rank`, `rows`,
`whole`. On stdout the trace as JSON, or `{"error": what, "faults": [[what, cure], ...]}`; exit code 0 in both cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from loomtune.errors import RunFailed, UserError
from loomtune.plan import Plan
from loomtune_plugins.planner.trace import Trace


def main() -> None:
    """Answers one question, or with `--many` one on each line, so that what is imported once serves all."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; only the answer is one
    lines = sys.stdin if "--many" in sys.argv else [sys.stdin.read()]
    for line in lines:
        answers.write(json.dumps(answered(json.loads(line))) + "\n")
        answers.flush()


def answered(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The trace that was asked for as plain data, or why there is none."""
    from loomtune_plugins.planner.rehearse import rehearse

    plan, rows = Plan.parse(asked["plan"]), asked.get("rows", ())
    try:
        whole = bool(asked.get("whole"))
        return rehearse(plan, int(asked["processes"]), int(asked.get("rank", 0)), rows=rows, whole=whole).plain()
    except UserError as error:
        return {"error": str(error), "faults": [[fault.what, fault.cure] for fault in error.faults]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "faults": []}


def elsewhere(
    plan: Plan, processes: int, rank: int = 0, *, rows: Sequence[Sequence[int]] = (), whole: bool = False
) -> Trace:
    """The trace of a plan, rehearsed in a child of this process. Raises UserError, and RunFailed where it breaks."""
    asked = {"plan": plan.dump(), "processes": processes, "rank": rank, "rows": list(map(list, rows)), "whole": whole}
    command = [sys.executable, "-m", "loomtune_plugins.planner.child"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RunFailed(f"the rehearsal broke: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    return parsed(json.loads(done.stdout))


def parsed(answer: Mapping[str, Any]) -> Trace:
    """A trace from an answer. Raises what it says went wrong."""
    if "error" not in answer:
        return Trace.of(answer)
    if answer["faults"]:
        from loomtune.errors import Fault

        raise UserError(*(Fault(what, cure) for what, cure in answer["faults"]))
    raise RunFailed(f"the rehearsal broke: {answer['error']}")


if __name__ == "__main__":
    main()
