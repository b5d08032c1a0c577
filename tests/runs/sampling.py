"""A run that draws completions as it goes, and the same run that does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loomtune.contracts import Evaluator, Sampling
from loomtune.loop import Loop
from loomtune.run import Run
from loomtune.world import World
from runs.ranks import assembled

PROMPTS = [[1, 40, 77, 130]]
"""One, so that a second rank has none."""


class Drawing(Evaluator):
    """Draws completions of a few prompts. drawn: those of every evaluation."""

    def __init__(self) -> None:
        self.drawn: list[list[list[int]]] = []

    def evaluate(self, run: Run) -> Mapping[str, float]:
        self.drawn.append(run.generate(PROMPTS, Sampling(max_tokens=12, temperature=1.0)))
        return {}


def both(world: World, drawing: Path, silent: Path) -> tuple[list[list[list[int]]], list[dict[str, Any]]]:
    """What was drawn on this rank, and the weights that the runs of two prepared folders left."""
    evaluator, weights = Drawing(), []
    for folder in (drawing, silent):
        assembly = assembled(world, folder)
        if folder == drawing:
            assembly.run.evaluators["drawing"] = evaluator  # type: ignore[index]
        assembly.build_roles()
        Loop(assembly.run, assembly.keeper).train()
        weights.append({name: tensor.numpy().copy() for name, tensor in assembly.run.policy.engine.stream_weights()})
    return evaluator.drawn, weights
