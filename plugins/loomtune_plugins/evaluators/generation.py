"""The answers of the model that is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Row, Sampling

if TYPE_CHECKING:
    from loomtune.run import Run

ROUND = 64
"""Prompts that a replica continues before all hear whether one was asked to leave."""


def generated(run: Run, prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[list[int]]:
    """Completions in the prompts' order, generated a round at a time."""
    for start in range(0, len(prompts), size := ROUND * run.world.replicas):
        run.heed()
        yield from run.generate(prompts[start : start + size], sampling)


def prompt(run: Run, row: Row) -> list[int]:
    """The row's prompt; nothing where it cannot be asked, or leaves the model no room to answer."""
    try:
        found = run.objective.prompt(row, run.tokenizer)
    except ValueError:
        return []
    return found if len(found) < run.model.context() else []
