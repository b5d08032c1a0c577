"""What every rank runs: `python -m loomtune.worker RUN`. Loads the frozen plan; never imports Hydra."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.catalogue import installed
from loomtune.checkpoint.files import replace_text
from loomtune.errors import LeaseLost, LoomtuneError, PeerLost, Preempted, UserError
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.signals import StopRequest, die_with_parent, end, end_stuck_agent

if TYPE_CHECKING:
    from loomtune.assembly import Assembly
    from loomtune.peers import Peer
    from loomtune.world import World

Result = dict[str, Any]

_SHARED = 60.0
"""Seconds at most in which a shared folder shows on every node what was written on one."""


def main() -> None:
    """Entry of a rank. Exit codes as in `loomtune.errors`."""
    folder = Path(sys.argv[1])
    die_with_parent()
    end(guarded(lambda: execute(Plan.load(folder) if (folder / "run.yaml").is_file() else None, folder)))


def guarded(work: Any) -> int:
    """Runs something; says errors on stderr, and to torchrun, and gives their exit code."""
    try:
        result = work()
    except LoomtuneError as error:
        record(error)
        if error.__cause__:
            traceback.print_exception(error.__cause__)
        print(f"loomtune: {error}", file=sys.stderr, flush=True)  # noqa: T201
        if isinstance(error, PeerLost):
            end_stuck_agent()
        return error.exit_code
    except Exception as error:
        record(error)
        traceback.print_exc()
        return 1
    return Preempted.exit_code if result["status"] == "preempted" else int(result["error"] is not None)


def record(error: BaseException) -> None:
    """Leaves an error where torchrun looks for it, as torch's ErrorHandler does. waited: another rank failed first."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        stack = "".join(traceback.format_exception(error))
        extra: dict[str, Any] = {"py_callstack": stack, "timestamp": str(int(time.time()))}
        extra |= {"host": os.uname().nodename, "waited": isinstance(error, PeerLost)}
        message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
        with suppress(OSError):  # a full disk does not change what is said, and how this ends
            replace_text(Path(path), json.dumps({"message": message}))


def execute(plan: Plan | None, folder: Path, world: World | None = None) -> Result:
    """Runs a plan on this rank, from its latest checkpoint if there is one, and writes `result.json`.

    plan: None where the folder is not seen, which all ranks are to hear of.
    world: one that is joined already and stays so; without it this process joins its world, and leaves it at the end.
    """
    from loomtune import peers
    from loomtune import world as worlds

    stop = StopRequest()
    stop.listen()
    stays = world is not None
    try:
        with peers.watched():
            world = world or worlds.join()
            hosts = world.gather(peers.Peer.me())
            plan = _same_everywhere(plan, folder, world, hosts)
            lease = _lease(folder, world, hosts)
            if (training := plan.training(world.size)) < world.size:
                from loomtune import aside

                trains, world = world.rank < training, aside.part(plan, world, hosts)
                if not trains:
                    return aside.serve(plan, folder, world, lease)
        stop.file = folder / "stop" if world.leads else None
        return _attempt(plan, folder, world, lease, stop, hosts)
    finally:
        if world and world.aside:
            world.aside.close()
        if not stays:
            worlds.leave()


def _attempt(
    plan: Plan, folder: Path, world: World, lease: Lease, stop: StopRequest, hosts: Sequence[Peer] = ()
) -> Result:
    from loomtune.assembly import assemble
    from loomtune.export import at_the_end
    from loomtune.peers import watched

    with watched(hosts):
        assembly = assemble(plan, folder, installed(), world, lease, stop=stop)
    run = assembly.run
    status: str = "failed"
    error: BaseException | str | None = None  # a text where the run is complete and something after it failed
    try:
        with watched(hosts):
            status = _trained(assembly)
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
    if status == "preempted":
        with suppress(RuntimeError):  # where one rank leaves, torchrun ends the others, whatever they are writing
            world.barrier()
    return result


def _trained(assembly: Assembly) -> str:
    from loomtune.dry import dry_step
    from loomtune.loop import Loop
    from loomtune.micro import token_budget
    from loomtune.probe import check_isolation

    run, keeper = assembly.run, assembly.keeper
    run.events.tell("run_started", run=run)
    assembly.build_roles()
    keeper.restore()
    check_isolation(run)
    run.token_budget = token_budget(run)
    dry_step(run)
    run.events.tell("model_ready", run=run)
    for guard in run.guards:
        guard.started(run)
    try:
        return Loop(run, keeper).train()
    finally:
        if run.rollout is not None:
            run.rollout.close()


def _result(status: str, step: int, metrics: dict[str, Any], error: BaseException | str | None) -> Result:
    said = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {"status": status, "step": step, "metrics": finite, "error": said}


def _same_everywhere(plan: Plan | None, folder: Path, world: World, hosts: Sequence[Peer]) -> Plan:
    """Every rank holds the plan, and the plugins that it was made with; otherwise hooks would run in other orders."""
    catalogue = installed()
    everyone = world.gather((plan is not None, catalogue.versions()))
    _seen(folder, hosts, [sees for sees, _ in everyone])
    plan = plan or Plan.load(folder)
    for host, (_, versions) in zip(hosts, everyone, strict=True):
        if versions != dict(plan.versions):
            odd = sorted(set(versions.items()) ^ set(plan.versions.items()))
            raise UserError.of(
                f"{host.host} has other plugins than the plan: {odd}",
                "install the same distributions on every node, or start a new run",
            )
    if world.size != plan.processes:  # torchrun was given other numbers, or nodes came and went
        plan.build(catalogue, "sharding").check(plan.training(world.size))
    return plan


def _lease(folder: Path, world: World, hosts: Sequence[Peer]) -> Lease:
    """The right to write to the run's folder, which rank 0 takes and the others see."""
    from loomtune.world import TIMEOUT

    lease = Lease(folder, world.broadcast(Lease.take(folder).attempt if world.leads else ""))
    _seen(folder, hosts, world.gather(lease.shows(min(_SHARED, TIMEOUT.total_seconds() / 4))))
    return lease


def _seen(folder: Path, hosts: Sequence[Peer], seen: Sequence[bool]) -> None:
    blind = sorted({peer.host for peer, sees in zip(hosts, seen, strict=True) if not sees})
    if blind and any(seen):
        raise UserError.of(
            f"{', '.join(blind)} does not see {folder} as other hosts do",
            "set run.dir to a folder that all nodes share and see under the same name",
        )


if __name__ == "__main__":
    main()
