"""What every rank runs: `python -m loomtune.worker RUN`. Loads the frozen plan; never imports Hydra."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.catalogue import Catalogue, installed
from loomtune.checkpoint.files import replace_text
from loomtune.errors import LeaseLost, LoomtuneError, Preempted, UserError
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.signals import StopRequest, die_with_parent, end

if TYPE_CHECKING:
    from loomtune.world import World

Result = dict[str, Any]


def main() -> None:
    """Entry of a rank. Exit codes as in `loomtune.errors`."""
    folder = Path(sys.argv[1])
    die_with_parent()
    end(guarded(lambda: execute(Plan.load(folder), folder)))


def guarded(work: Any) -> int:
    """Runs something; says errors on stderr and gives their exit code."""
    try:
        result = work()
    except LoomtuneError as error:
        print(f"loomtune: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return Preempted.exit_code if result["status"] == "preempted" else int(result["error"] is not None)


def execute(plan: Plan, folder: Path, world: World | None = None) -> Result:
    """Runs a plan on this rank, from its latest checkpoint if there is one, and writes `result.json`.

    world: one that is joined already and stays so; without it this process joins its world, and leaves it at the end.
    """
    from loomtune import world as worlds

    stop = StopRequest()
    stop.listen()
    stays = world is not None
    world = world or worlds.join()
    catalogue = installed()
    try:
        _same_everywhere(catalogue, plan, world)
        lease = Lease.take(folder) if world.leads else None
        lease = Lease(folder, world.broadcast(lease.attempt if lease else ""))
        return _attempt(plan, folder, catalogue, world, lease, stop)
    finally:
        if not stays:
            worlds.leave()


def _attempt(plan: Plan, folder: Path, catalogue: Catalogue, world: Any, lease: Lease, stop: StopRequest) -> Result:
    from loomtune.assembly import assemble
    from loomtune.export import at_the_end
    from loomtune.loop import Loop
    from loomtune.micro import token_budget
    from loomtune.probe import check_isolation

    assembly = assemble(plan, folder, catalogue, world, lease, stop=stop)
    run, keeper = assembly.run, assembly.keeper
    status: str = "failed"
    error: BaseException | str | None = None  # a text where the run is complete and something after it failed
    try:
        run.events.tell("run_started", run=run)
        assembly.build_roles()
        keeper.restore()
        check_isolation(run)
        run.token_budget = token_budget(run)
        run.events.tell("model_ready", run=run)
        for guard in run.guards:
            guard.started(run)
        status = Loop(run, keeper).train()
    except Preempted as asked:
        status = "preempted"
        run.tell_once(str(asked))
    except BaseException as caught:
        error = caught
        run.events.tell("run_failed", run=run, error=caught)
        raise
    finally:
        for guard in run.guards:
            guard.finished(run)
        if status == "completed" and world.leads:
            error = at_the_end(run)  # after the guards, one of which would take it for a stall
        result = _result(status, run.step, run.metrics, error)
        if world.leads and not isinstance(error, LeaseLost):
            replace_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
        run.events.tell("run_finished", run=run, status=status)
    return result


def _result(status: str, step: int, metrics: dict[str, Any], error: BaseException | str | None) -> Result:
    said = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {"status": status, "step": step, "metrics": finite, "error": said}


def _same_everywhere(catalogue: Catalogue, plan: Plan, world: Any) -> None:
    """Every rank holds the plugins that the plan was made with; otherwise hooks would run in different orders."""
    everyone = world.gather((os.uname().nodename, catalogue.versions()))
    for rank, (host, versions) in enumerate(everyone):
        if versions != dict(plan.versions):
            odd = sorted(set(versions.items()) ^ set(plan.versions.items()))
            raise UserError.of(
                f"rank {rank} on {host} has other plugins than the plan: {odd}",
                "install the same distributions on every node, or start a new run",
            )


if __name__ == "__main__":
    main()
