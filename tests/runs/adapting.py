"""What adapters leave alone, and what becomes of them once they are saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loomtune import api, checkpoint
from loomtune.contracts import Batch, Engine
from loomtune.loop import Loop
from loomtune.session import opened
from loomtune.world import World
from runs.ranks import assembled

ROWS = 4


def trained(folder: Path, world: World) -> dict[str, Any]:
    """Runs a plan to its end; says how many tensors are frozen, and which of them have not kept every bit."""
    assembly = assembled(world, folder)
    run = assembly.run
    run.events.tell("run_started", run=run)
    assembly.build_roles()
    before = digests(run.policy.engine)
    status = Loop(run, assembly.keeper).train()
    after = digests(run.policy.engine)
    run.events.tell("run_finished", run=run, status=status)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return {"status": status, "metrics": {}, "frozen": len(before), "changed": changed}


def digests(engine: Engine) -> dict[str, str]:
    """Of every whole tensor that is not trained, wherever its parts lie. Collective."""
    learned = engine.trained()
    stream = engine.stream_weights(lambda name: name not in learned)
    return {name: hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest() for name, tensor in stream}


@dataclass(frozen=True)
class Row:
    """Logits `(targets, vocabulary)` at the positions that predict, for a row of tokens `(1, length)`."""

    tokens: Tensor
    predict_from: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Said:
    """What a run's model says. exact: whether it says so on the base as it is stored.

    others: the weights that layers compute with where they are not those of the base, because 4 bits hold no more.
    """

    rows: list[Row]
    others: dict[str, Tensor]

    @property
    def exact(self) -> bool:
        """True where no layer computes with other weights than those stored."""
        return not self.others

    def apart(self, model: Any) -> float:
        """How far a model of transformers or peft is from it, relative to the largest logit."""
        found = [logits(model, row) for row in self.rows]
        largest = max(float(row.logits.abs().max()) for row in self.rows)
        return max(float((a - b.logits).abs().max()) for a, b in zip(found, self.rows, strict=True)) / largest

    def said_by(self, model: Any) -> Said:
        """What another model says of the same rows."""
        return Said([Row(row.tokens, row.predict_from, logits(model, row)) for row in self.rows], {})


def logits(model: Any, row: Row) -> Tensor:
    """Those of a model of transformers or peft for a row."""
    with torch.inference_mode():
        # Virtual tokens come before the row, and peft gives their logits too.
        found = model(row.tokens).logits[0, -row.tokens.shape[1] :].float()
    picked: Tensor = found[row.predict_from]
    return picked


def said(folder: Path) -> Said:
    """What the run's engine says about its first rows, opened from the last checkpoint on this process."""
    plan = api.resumed(folder, [*api.ALONE, "batch.micro=1"])
    with opened(plan, folder) as run:
        engine = run.policy.engine
        with engine.evaluating():
            rows = [_row(engine, batch) for batch in run.batches("train", ROWS)]
        with engine.gathered() as module:
            return Said(rows, dict(_others(module)))


def _row(engine: Engine, batch: Batch) -> Row:
    found = engine.forward(batch, lambda view: view.heads["lm"](view.states), adapter=True)
    return Row(batch.tokens, batch.predict_from, found.float())


def _others(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights, by their names in the base, of linear layers that hold something else and make them of it."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and "weight" not in layer._parameters:
            yield f"{name.replace('.base_layer', '')}.weight", layer.weight.detach().float().clone()


def reopened(folder: Path, base: Path, others: Mapping[str, Tensor]) -> Any:
    """What the last checkpoint holds for other programs: an adapter on its base, or a whole model.

    others: weights that take the place of the base's.
    """
    latest = checkpoint.latest(folder / "checkpoints")
    assert latest is not None
    if not (latest / "adapter").is_dir():
        return in_transformers(latest / "model")
    model = in_transformers(base)
    with torch.no_grad():
        for name, weight in others.items():
            model.get_parameter(name).copy_(weight)
    return with_adapter(model, latest / "adapter")


def with_adapter(model: Any, folder: Path) -> Any:
    """As any program of peft opens it; bottleneck adapters, which peft has not, by their own function."""
    if "format" in json.loads((folder / "adapter_config.json").read_text()):
        from loomtune_plugins.adapters.bottleneck.bottleneck import attach

        return attach(model, folder).eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).eval()


def in_transformers(folder: Path) -> Any:
    """A model's folder, with nothing missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()
