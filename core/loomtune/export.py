"""From a run's checkpoint to a folder that others serve: no process group, no engine, one tensor at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from loomtune import checkpoint
from loomtune.catalogue import Catalogue, installed
from loomtune.checkpoint.files import sync_folder
from loomtune.contracts import Adapter, Exporter, Model
from loomtune.errors import CheckpointError, UserError
from loomtune.plan import Plan

ROLE = "policy"
HEADS = "heads."


def export(folder: Path, out: Path | None = None, to: str = "huggingface", which: str = "latest") -> Path:
    """Writes a run's model by the exporter `to` and gives the folder. out: default `RUN/export/<to>`.

    which: `latest`, `best`, or a step. Nothing is there under that name until all of it is.
    """
    plan, catalogue = Plan.load(folder), installed()
    exporter: Exporter = catalogue.build("exporter", to, plan.choices("exporter").get(to, {"name": to}))
    final = (out or folder / "export" / to).absolute()
    _check_free(final)
    reader = checkpoint.Reader(_chosen(folder / "checkpoints", which))
    model: Model = plan.build(catalogue, "model")
    model.check()
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = final.with_name(f".{final.name}-{uuid4().hex[:8]}")
    try:
        draft.mkdir()
        exporter.export(model, _merged(plan, catalogue, model, reader), draft)
        _sync(draft)
        draft.rename(final)
    except OSError as error:
        cure = "choose another folder with --out, or make space"
        raise UserError.of(f"{final} cannot be written: {error}", cure) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _check_free(final: Path) -> None:
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        what = "is not empty" if final.is_dir() else "is a file"
        raise UserError.of(f"{final} {what}, and nothing is overwritten", "choose another folder with --out")


def _chosen(checkpoints: Path, which: str) -> Path:
    """The checkpoint that is meant. Raises UserError where there is none, naming those that there are."""
    if which == "latest":
        path = checkpoint.latest(checkpoints)
    elif which == "best":
        path = checkpoint.best(checkpoints)
    else:
        step = which.removeprefix("step-")
        path = checkpoints / checkpoint.name_of(int(step)) if step.isdigit() else None
    if path is None or not path.is_dir():
        there = sorted(found.name for found in checkpoints.glob("step-*") if found.name[5:].isdigit())
        cure = f"set --checkpoint to latest or to one of {', '.join(there)}" if there else "train it first"
        raise UserError.of(f"{checkpoints.parent} has no {which} checkpoint", cure)
    return path


def _merged(plan: Plan, catalogue: Catalogue, model: Model, reader: checkpoint.Reader) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors in fp32, as they are after the training."""
    adapter: Adapter = plan.build(catalogue, "adapter")
    seed = plan.root.seed
    with torch.device("meta"):
        skeleton = model.skeleton()
    _, source = adapter.weave(skeleton, model.weights(seed), seed)
    stored = {name for role, name, tensor in reader.manifest.index if (role, tensor) == (ROLE, "weight")}
    heads = {name for name in stored | source.shapes().keys() if name.startswith(HEADS)}
    learned = {name for name in source.shapes() if adapter.saves_base or adapter.base_name(name) is None}
    if wrong := sorted((stored - source.shapes().keys() | learned - stored) - heads):
        what = f"{reader.path} and the model that the run began with differ in {wrong[0]}"
        raise CheckpointError(f"{what}\n    cure: restore both, or name another checkpoint")
    read = reader.read(ROLE)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in [*source.shapes(), *sorted(heads - source.shapes().keys())]:
            value = read(name, "weight", None) if name in stored else source.read(name)
            yield name, value.float() if value.is_floating_point() else value

    return adapter.merged(tensors())


def _sync(folder: Path) -> None:
    """What is renamed must be on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
