"""Runs that learn from completions, compared: what was drawn, and what was learned of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "micro-batches of 3": (1, ["sharding=single", "batch.micro=3"]),
    "ddp on 2": (2, ["sharding=ddp", "rollout.batch=2"]),
    "ddp, sequence 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp", "batch.micro=2"]),
    "fsdp, tensor 2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3", "batch.micro=2"]),
}
"""World size and settings of each."""

SOON = ("micro-batches of 3", "ddp on 2")
"""The layouts whose processes are there already for other tests."""


def apart(one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """The largest difference of each metric over all steps, relative where it is above 1.

    one, other: what `writing.written` gave of two runs. Completions have to be the same, token by token.
    """
    assert len(one["heard"]) > 0, "nothing was drawn"
    assert one["heard"] == other["heard"], "completions differ"
    assert len(one["lines"]) == len(other["lines"])
    return {
        name: max(_far(*both) for both in zip(*(_series(run, name) for run in (one, other)), strict=True))
        for name in names
    }


def _series(run: Mapping[str, Any], name: str) -> list[float]:
    found = [line[name] for line in run["lines"] if name in line]
    assert found, f"no step says {name}"
    return found


def _far(one: float, other: float) -> float:
    return abs(one - other) / max(1.0, abs(other))
