"""A run whose ranks write down which rows they really computed: by the tokens of every micro-batch that had a loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loomtune.contracts import Batch
from loomtune.loop import Loop
from loomtune.world import World
from runs.ranks import assembled

FILE = "computed-{attempt}-{rank}.jsonl"


def witnessed(folder: Path, world: World) -> dict[str, Any]:
    """Trains the run of a prepared folder from where it stands; each micro-batch's rows are a line of a file."""
    assembly = assembled(world, folder)
    run = assembly.run
    assembly.build_roles()
    assembly.keeper.restore()
    train = run.splits["train"]
    known = {train[row].segments[0].tokens.tobytes(): row for row in range(len(train))}
    assert len(known) == len(train), "two rows of the same tokens could not be told apart"
    loss = run.objective.loss
    path = folder / FILE.format(attempt=f"{world.size}-{run.step}", rank=world.rank)

    def watched(roles: Any, batch: Batch, totals: Any, statistics: Any) -> Any:
        rows = [known[_tokens(batch, segment)] for segment in range(len(batch.parents))]
        with path.open("a") as file:
            file.write(json.dumps([run.step, rows]) + "\n")
        return loss(roles, batch, totals, statistics)

    run.objective.loss = watched  # type: ignore[method-assign]
    status = Loop(run, assembly.keeper).train()
    for role in run.roles.values():
        role.engine.close()
    return {"metrics": {}, "status": status, "step": run.step, "sources": dict(train.sources)}


def _tokens(batch: Batch, segment: int) -> bytes:
    return batch.tokens[batch.segments == segment].to("cpu").numpy().astype("<i4").tobytes()


def computed(folder: Path) -> list[tuple[int, list[int]]]:
    """(step, rows) of every micro-batch that any rank of any attempt computed."""
    lines = [line for path in sorted(folder.glob(FILE.format(attempt="*", rank="*"))) for line in path.open()]
    return [(step, rows) for step, rows in map(json.loads, lines)]
