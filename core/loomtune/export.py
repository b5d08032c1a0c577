"""From a run's checkpoint to a folder that others serve: no process group, no engine, one tensor at a time."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from loomtune import checkpoint
from loomtune.catalogue import Catalogue, installed
from loomtune.checkpoint.files import sync_folder
from loomtune.contracts import Adapter, Exporter, Model
from loomtune.contracts.saved import HEADS
from loomtune.errors import CheckpointError, UserError
from loomtune.events import Events
from loomtune.plan import Plan
from loomtune.run import Run

ROLE = "policy"


def export(
    folder: Path,
    out: Path | None = None,
    to: str = "huggingface",
    which: str = "latest",
    events: Events | None = None,
) -> Path:
    """Writes a run's model by the exporter `to` and gives the folder. out: default `RUN/export/<to>`.

    which: `latest`, `best`, or a step. events: who is told, by default every plugin. Nothing is there under that name
    until all of it is.
    """
    plan, catalogue = Plan.load(folder), installed()
    exporter: Exporter = catalogue.build("exporter", to, plan.choices("exporter").get(to, {"name": to}))
    final = (out or folder / "export" / to).absolute()
    _check_free(final)
    reader = checkpoint.Reader(_chosen(folder / "checkpoints", which))
    model: Model = plan.build(catalogue, "model")
    model.check()
    draft = final.with_name(f".{final.name}-{uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
        exporter.export(model, _merged(plan, catalogue, model, reader), draft)
        _sync(draft)
        draft.rename(final)
    except OSError as error:
        cure = "choose another folder with --out, or make space"
        raise UserError.of(f"{final} cannot be written: {error}", cure) from error
    finally:
        reader.close()
        shutil.rmtree(draft, ignore_errors=True)
    events = events or Events((name, catalogue.manager.get_plugin(name)) for name in catalogue.sources)
    events.tell("exported", folder=folder, path=final)
    return final


def at_the_end(run: Run) -> str | None:
    """Exports what a run ends with by each exporter chosen; what fails is said, and given. One process calls it.

    The folder bears the step, so that one that is there already holds this very model.
    """
    failed = []
    for name in run.plan.choices("exporter"):
        out = run.folder / "export" / f"{name}-{checkpoint.name_of(run.step)}"
        try:
            if not out.is_dir():
                export(run.folder, out, name, str(run.step), run.events)
        except Exception as error:  # an exporter may fail in any manner, and the run is complete all the same
            failed.append(f"exporter={name} failed: {type(error).__name__}: {error}")
            print(f"loomtune: {failed[-1]}", file=sys.stderr, flush=True)  # noqa: T201
    return "; ".join(failed) or None


def _check_free(final: Path) -> None:
    # `Path.exists` would raise where a folder on the way may not be entered, which is told where the draft is made
    if os.path.exists(final) and not (final.is_dir() and not any(final.iterdir())):  # noqa: PTH110
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
        path = checkpoints / checkpoint.name_of(int(step)) if step.isdecimal() else None
    if path is None or not path.is_dir():
        there = sorted(found.name for found in checkpoints.glob("step-*") if found.name[5:].isdecimal())
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
