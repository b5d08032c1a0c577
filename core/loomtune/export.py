"""From a run's checkpoint to a folder that others serve: no process group, no engine, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from loomtune import checkpoint, inputs
from loomtune.catalogue import Catalogue, installed
from loomtune.checkpoint.files import sync_folder
from loomtune.contracts import Adapter, Exporter, Model, Trained
from loomtune.contracts.saved import HEADS, INNER
from loomtune.errors import CheckpointError, UserError
from loomtune.events import Events
from loomtune.plan import Plan
from loomtune.run import Run
from loomtune.verify import compared

ROLE = "policy"
ABOUT = "export.json"
"""What was exported, and how far it was found from what was trained."""


def export(
    folder: Path,
    out: Path | None = None,
    to: str = "huggingface",
    which: str = "latest",
    events: Events | None = None,
    *,
    check: bool = True,
    plan: Plan | None = None,
) -> Path:
    """Writes a run's model by the exporter `to` and gives the folder. out: default `RUN/export/<to>`.

    which: `latest`, `best`, or a step. events: who is told, by default every plugin. check: whether what left is
    compared with what was trained. plan: the run's, with other settings of the exporter. Nothing is there under that
    name until all of it is. Raises ExportError where what left says other than what was trained.
    """
    plan, catalogue = plan or Plan.load(folder), installed()
    _check_fits(catalogue, to, plan.chosen("adapter")["name"])
    exporter: Exporter = catalogue.build("exporter", to, plan.choices("exporter").get(to, {"name": to}))
    final = (out or folder / "export" / to).absolute()
    _check_free(final)
    inputs.check(folder, began := inputs.fingerprints(plan, catalogue, roles=False))
    reader = checkpoint.Reader(_chosen(folder / "checkpoints", which))
    draft = final.with_name(f".{final.name}-{uuid4().hex[:8]}")
    try:
        trained = _trained(plan, catalogue, reader)
        draft.mkdir(parents=True)
        exporter.export(trained, draft)
        check &= exporter.check
        opened = exporter.reopened(trained, draft) if check else None
        found = compared(plan, catalogue, trained, opened, folder) if opened else None
        about = {"run": plan.hash, "step": reader.step, "exporter": to, **(found or _uncompared(final, check))}
        about["chat_template"] = began.get(inputs.TEMPLATE)
        about["versions"] = {"torch": str(torch.__version__), **plan.versions}
        (draft / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
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


def _uncompared(final: Path, check: bool) -> dict[str, Any]:
    why = "nothing here opens this format" if check else "it was not asked for"
    print(f"loomtune: {final} was not compared with what was trained: {why}", file=sys.stderr)  # noqa: T201
    return {"compared": None, "why": why}


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


def _check_fits(catalogue: Catalogue, to: str, adapter: str) -> None:
    """Says before anything is written what preflight would have said of this exporter."""
    asked, trained = catalogue.find("exporter", to), catalogue.find("adapter", adapter)
    if clash := sorted(asked.offer.excludes.keys() & trained.offer.provides):
        every = catalogue.entries("exporter")
        fitting = [one.offer.name for one in every if not one.offer.excludes.keys() & trained.offer.provides]
        what = f"{asked} does not go with {trained}: {asked.offer.excludes[clash[0]]}"
        raise UserError.of(what, f"set --to {' or --to '.join(fitting)}")


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


def _trained(plan: Plan, catalogue: Catalogue, reader: checkpoint.Reader) -> Trained:
    """The model of a checkpoint. Raises CheckpointError where it is not of the model that the run began with."""
    model: Model = plan.build(catalogue, "model")
    model.check()
    adapter: Adapter = plan.build(catalogue, "adapter").exact()
    weights = model.weights(plan.root.seed)
    with torch.device("meta"):
        skeleton = model.skeleton()
    adapter.meet(model)
    woven, source = adapter.weave(skeleton, weights, plan.root.seed)
    kept = {name for role, name, tensor in reader.manifest.index if (role, tensor) == (ROLE, "weight")}
    kept = {name for name in kept if not name.startswith(INNER)}
    there = source.shapes().keys()
    learned = {name for name, parameter in woven.named_parameters() if parameter.requires_grad} & there
    heads, read = {name for name in kept | there if name.startswith(HEADS)}, reader.read(ROLE)
    if wrong := sorted((kept - there | learned - kept) - heads):
        what = f"{reader.path} and the model that the run began with differ in {wrong[0]}"
        raise CheckpointError(f"{what}\n    cure: restore both, or name another checkpoint")
    return Trained(
        model=model,
        adapter=adapter,
        chosen=plan.chosen("model"),
        weights=weights,
        source=source,
        learned=frozenset(learned),
        kept=frozenset(kept),
        fetch=lambda name: read(name, "weight", None),
    )


def _sync(folder: Path) -> None:
    """What is renamed must be on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
