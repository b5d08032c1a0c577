"""Rehearsals that cost nothing: traces whose memory follows a planted rule, for tests of what is made of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loomtune import cli
from loomtune.plan import Plan
from loomtune_plugins.commands.plan import foreseen
from loomtune_plugins.planner.trace import Collective, Peak, Trace, Work

PARAMETERS = 70_553_706_496
TOKEN = 1_400_000
"""Bytes of a token's activations, without checkpointing."""


def planted(plan: Plan, processes: int, rank: int = 0, **_: Any) -> Trace:
    """16 bytes a parameter shared out, and activations that a micro-batch and checkpointing decide."""
    sharding, root = plan.chosen("sharding"), plan.root
    shards = {"fsdp": processes // sharding.get("replicate", 1), "zero": processes}.get(sharding["name"], 1)
    micro = root.batch.micro if isinstance(root.batch.micro, int) else 1
    tokens = micro * root.max_length
    batches = max(1, math.ceil(root.batch.size / processes / micro))
    state = 4 * PARAMETERS // shards
    kept = {"parameters": state, "gradients": state, "optimizer": 2 * state}
    host = {"optimizer": 4 * state} if sharding.get("offload") in (True, "all") else {}
    causes = {} if host else dict(kept)
    causes["activations"] = tokens * TOKEN // (10 if sharding.get("activation_checkpointing") else 1)
    if sharding.get("accumulate_sharded") is False and batches > 1:
        causes["gradients"] = 4 * PARAMETERS
    forward = {**causes, "gradients": 0}
    moments = {
        "forward": Peak(sum(forward.values()), forward),
        "backward": Peak(sum(causes.values()), causes),
    }
    again = 4 / 3 if sharding.get("activation_checkpointing") else 1.0
    work = [
        Work("matmul", "bf16", "forward", (1, tokens, 8192, 8192), 6 * PARAMETERS * tokens * again, 1e9, count=batches)
    ]
    work += [Work("copy", "bf16", "optimizer", (), 0.0, 32.0 * state)] if host else []
    gathered = Collective("all_gather", 2 * PARAMETERS, tuple(range(processes)), "forward", "bf16", batches)
    return Trace(
        rank,
        processes,
        80.0,
        moments,
        {} if host else kept,
        host,
        [gathered],
        work,
        tokens * batches,
        tokens * batches,
        batches,
        (PARAMETERS, PARAMETERS, PARAMETERS),
    )


def called(*words: str) -> int:
    """The exit code of `loomtune` with these words."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return int(ended.value.code or 0)


def plant(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Has whatever is rehearsed be planted; gives what was asked for."""
    asked: list[Plan] = []

    def noted(plan: Plan, processes: int, rank: int = 0, **given: Any) -> Trace:
        asked.append(plan)
        return planted(plan, processes, rank)

    monkeypatch.setattr(foreseen, "rehearse", noted)
    monkeypatch.setattr(foreseen, "traced", noted)
    monkeypatch.setattr(foreseen, "depths", lambda count, period: ())
    return asked
