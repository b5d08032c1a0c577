"""A run that is trained to its end, and what its policy wrote on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loomtune import hookimpl
from loomtune.batching import collate
from loomtune.contracts import Drawn
from loomtune.loop import Loop
from loomtune.run import Run
from loomtune.world import World, reseed
from loomtune_plugins.objectives.distill import Distill
from loomtune_plugins.objectives.distill_settings import DistillSettings
from runs.ranks import assembled
from runs.worlds import clocked


class Listener:
    """Hears what was written, and each step's metrics. heard: (step, prompt, completion)."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, object, object]] = []
        self.lines: list[dict[str, float]] = []

    @hookimpl
    def rollout_finished(self, run: Run, step: int, samples: Sequence[Mapping[str, object]]) -> None:
        self.heard += [(step, sample["prompt"], sample["completion"]) for sample in samples]

    @hookimpl
    def step_finished(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.lines.append({name: value for name, value in metrics.items() if not clocked(name)})


def written(folder: Path, world: World) -> dict[str, Any]:
    """Trains the run of a prepared folder; gives what its policy wrote, and its metrics."""
    assembly = assembled(world, folder)
    assembly.run.events.manager.register(listener := Listener())
    assembly.build_roles()
    Loop(assembly.run, assembly.keeper).train()
    for engine in {role.engine for role in assembly.run.roles.values()}:
        engine.close()
    return {"metrics": {}, "heard": listener.heard, "lines": listener.lines}


def distance(folder: Path, world: World) -> dict[str, Any]:
    """Trains the run of a prepared folder; gives KL(policy || teacher), a mean over tokens, on what the policy writes
    then, and on the rows' own answers."""
    assembly = assembled(world, folder)
    assembly.build_roles()
    Loop(assembly.run, assembly.keeper).train()
    run, far = assembly.run, {}
    reseed(0, 0, 0)
    for name, share in (("written", 1.0), ("own", 0.0)):
        measure = Distill(DistillSettings(beta=1.0, on_policy=share, **({"max_new_tokens": 16} if share else {})))
        samples = [measure.sample(row, run.tokenizer, run.max_length) for row in run.rows("train")]
        (step,) = measure.experience(run, [Drawn(row, sample) for row, sample in enumerate(samples)])
        batch = collate(step, range(len(step)), run.tokenizer.pad_id)
        with torch.no_grad(), run.policy.engine.evaluating():
            total = measure.loss(run.roles, batch, measure.weights(batch), {}).terms["loss"]
        far[name] = float(total) / len(batch.target)
    for role in run.roles.values():
        role.engine.close()
    return {"metrics": {}, **far}
