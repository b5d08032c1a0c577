"""Work for ranks: answers are scored by a reward model while a run trains, which is to notice nothing of it."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from loomtune.contracts import Answer
from loomtune.errors import Preempted
from loomtune.loop import Loop
from loomtune.run import Run
from loomtune.world import World
from loomtune_plugins.rewards.model import RewardByModel
from loomtune_plugins.rewards.model_settings import ModelSettings
from runs.ranks import assembled

LORA = ["adapter=lora", "adapter.rank=4", "max_length=64"]
"""Of the reward model that is worn, and of who wears it."""

ADAPTER = "adapter.txt"
"""In a run's folder: where the reward run lies whose adapter is to be worn."""

TEXTS = [("a loom", "weaves"), ("a loom", "hums and hums"), ("a reed", ""), ("cloth of warp", "and weft"), ("w", "x")]


def answers(run: Run) -> list[Answer]:
    """Answers to prompts as rows of the run have them, some that came to their end and some that did not."""
    made = []
    for number, (asked, said) in enumerate(TEXTS):
        row = {"prompt": asked}
        ended = number % 2 == 0 and bool(said)
        tokens = [*run.tokenizer.encode(said), *([run.tokenizer.eos_id] if ended else [])]
        made.append(Answer(row, run.objective.prompt({**row, "completion": "x"}, run.tokenizer), tokens, said, ended))
    return made


def state(run: Run) -> dict[Any, torch.Tensor]:
    """All that this rank holds of what is trained, weights and the optimizer's state, and what others see of it."""
    (engine,) = run.trained_engines()
    parts = {
        (shard.name, shard.offset, name): tensor.detach().clone()
        for shard in engine.shards()
        for name, tensor in shard.tensors.items()
    }
    return parts | {name: tensor.clone() for name, tensor in engine.stream_weights()}


def same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def scored_between_steps(folder: Path, world: World) -> dict[str, Any]:
    """Two steps, between which answers are scored, once until a rank is asked to leave and once until an error."""
    assembly = assembled(world, folder)
    assembly.build_roles()
    run = assembly.run
    loop = Loop(run, assembly.keeper)
    loop._fetch()
    loop._step(0.0)
    adapter = (folder / ADAPTER).read_text()
    before, given = state(run), answers(run)
    kept = []
    reward = RewardByModel(ModelSettings(adapter=adapter))
    run.stop.asked = world.rank == world.size - 1
    with suppress(Preempted):
        kept.append(math.fsum(reward.score(run, given)))
    run.stop.asked = False
    kept.append(same(before, state(run)))
    with suppress(ZeroDivisionError), run.policy.engine.wearing(reward._open(run)[0]):
        assert not same(before, state(run)), "what is worn is another adapter"
        raise ZeroDivisionError
    kept.append(same(before, state(run)))
    scores = reward.score(run, given)
    kept.append(same(before, state(run)))
    loop._fetch()
    loop._step(0.0)
    metrics = {"loss": run.metrics["loss"], "norm": run.metrics["grad_norm"], "scores": scores, "kept": kept}
    for engine in run.trained_engines():
        engine.close()
    return {"metrics": metrics}
