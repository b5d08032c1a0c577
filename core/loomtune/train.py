"""The entry for ranks that were started by hand: `torchrun ... -m loomtune.train key=value ...`.

Global rank 0 composes; the others get the frozen plan over the rendezvous' store, before any process group exists, so
that a mistake ends all of them with the same message.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from loomtune.errors import Fault, UserError
from loomtune.plan import Plan
from loomtune.signals import die_with_parent, end
from loomtune.worker import execute, guarded, record

KEY = "loomtune/plan"
PATIENCE = timedelta(hours=2)
"""How long the other ranks wait while rank 0 tokenises."""

GRACE = timedelta(minutes=1)
"""How long rank 0 waits for ranks that start late, where there is only a mistake to tell them."""

_FRAGILE = """loomtune: torchrun's restarts mostly fail in torch 2.13, and no node can join again, unless
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set where torchrun is started, on every host"""


def main() -> None:
    """Entry of a rank, or of a single process without torchrun."""
    die_with_parent()
    end(guarded(lambda: _train(sys.argv[1:])))


def _train(overrides: list[str]) -> Any:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        plan, folder = _composed(overrides, size)
        return execute(plan, folder)
    from loomtune.peers import watched

    with watched():
        store = _store(rank, size)
        if rank == 0:
            _hand_out(store, overrides, size)
        answer = json.loads(store.get(KEY))
    if "faults" in answer:
        error = UserError(*(Fault(*fault) for fault in answer["faults"]))
        _leave_together(store, rank, size, error)
        raise error
    return execute(Plan.parse(answer["plan"]), Path(answer["folder"]))


def _hand_out(store: Any, overrides: list[str], size: int) -> None:
    try:
        plan, folder = _composed(overrides, size)
        store.set(KEY, json.dumps({"plan": plan.dump(), "folder": str(folder)}))
    except UserError as error:
        store.set(KEY, json.dumps({"faults": [(fault.what, fault.cure) for fault in error.faults]}))


def _leave_together(store: Any, rank: int, size: int, error: UserError) -> None:
    """Rank 0 alone says what is wrong, once the others have heard: its end would take the store with it."""
    store.set(f"{KEY}/heard/{rank}", "")
    if rank:
        record(error)  # each node's torchrun tells it
        sys.exit(UserError.exit_code)
    with suppress(Exception):  # a rank that never came is its launcher's concern
        store.wait([f"{KEY}/heard/{other}" for other in range(size)], GRACE)


def _composed(overrides: list[str], size: int) -> tuple[Plan, Path]:
    from loomtune import api, tokenising

    plan = api.compose([*overrides, *_named_folder(overrides)], processes=size)
    tokenising.warn(api.check(plan))
    return plan, api.prepare(plan)


def _named_folder(overrides: list[str]) -> list[str]:
    """Restarts of torchrun must meet the same folder: it is named after the rendezvous, or after torchrun's process."""
    if any(text.startswith("run.dir=") for text in overrides):
        return []
    rendezvous = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if rendezvous != "none":
        return [f"run.dir='runs/{rendezvous}'"]
    # torchrun itself is this rank's parent, and outlives a restart of its ranks.
    return [f"run.dir='runs/by-hand-{os.getppid()}'"] if "TORCHELASTIC_RUN_ID" in os.environ else []


def _store(rank: int, size: int) -> Any:
    """torchrun's own store, with keys of this attempt, so that a restarted group reads no old answer; or rank 0's.

    That one is new at each start; a node that joined late counts its restarts from 0.
    """
    import torch.distributed as dist

    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0 and shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        print(_FRAGILE, file=sys.stderr, flush=True)  # noqa: T201
    # The process group, too, has rank 0 serve this port where torchrun does not: several tenants share one server.
    serves = rank == 0 and not shared
    store = dist.TCPStore(host, port, size, is_master=serves, timeout=PATIENCE, multi_tenant=True)
    return dist.PrefixStore(f"loomtune/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if shared else ''}", store)


if __name__ == "__main__":
    main()
