"""What the files of a trained reward model say of it, and whether that suits a plan. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loomtune.catalogue import installed
from loomtune.contracts import Model
from loomtune.contracts.saved import HEADS, HEADS_FILE, stored_shapes
from loomtune.errors import UserError
from loomtune.offers import Trait
from loomtune.plan import Finding, Plan
from loomtune_plugins.scalar_scores import HEAD, RENDERING

KEY = "reward.model.adapter"
ROLE = "roles.reward.model"
IDLE = ("dropout", "plus_ratio")
"""Settings of adapters that bear on training alone: what a trained one computes does not depend on them."""


@dataclass(frozen=True, slots=True)
class Files:
    """Where a reward model lies. run: the folder of the run that trained it, None where nobody says.

    place: the folder with its weights. checkpoint: the one that this belongs to, None for an exported folder.
    """

    run: Path | None
    place: Path
    checkpoint: Path | None

    @classmethod
    def of(cls, path: str, which: str = "latest", part: str = "model") -> Files | None:
        """Of a run, its checkpoint, or a folder; None for what is no folder here. part: of a checkpoint."""
        here = Path(path).expanduser()
        if not path or not here.is_dir():
            return None
        if (here / "run.yaml").is_file():
            pointer = here / "checkpoints" / {"best": "BEST"}.get(which, "LATEST")
            if not pointer.is_file():
                return None
            found = here / "checkpoints" / pointer.read_text(encoding="utf-8").strip()
            return cls(here, found / part, found)
        if (here / "manifest.json").is_file():
            run = here.parents[1] if (here.parents[1] / "run.yaml").is_file() else None
            return cls(run, here / part, here)
        return cls(None, here, None)

    @property
    def heads(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the scalar heads that were trained, by name."""
        file = self.place / HEADS_FILE
        return stored_shapes(file) if file.is_file() else {}

    def inputs(self, key: str) -> str:
        """The digest of what the run began from; empty where it does not say."""
        file = self.run / "inputs.json" if self.run else None
        said = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
        return str(said.get(key) or "")

    @property
    def template(self) -> str:
        """Digest of the chat template that it was trained with; empty where nobody says."""
        exported = self.place / "export.json"
        if self.run is None and exported.is_file():
            return str(json.loads(exported.read_text(encoding="utf-8")).get("chat_template") or "")
        return self.inputs("model.chat_template")


def worn(path: str) -> Files:
    """The adapter of a reward run. Raises UserError where it is none."""
    found = Files.of(path, part="adapter")
    if found is None or found.checkpoint is None or found.run is None:
        cure = f"set {KEY} to the folder of a run with objective=reward, or to RUN/checkpoints/step-N"
        raise UserError.of(f"{KEY}={path} is no run that has a checkpoint", cure)
    if not found.place.is_dir():
        raise UserError.of(f"{KEY}={path} trained the model itself, no adapter", f"set {ROLE}.path={path} instead")
    return found


def findings(plan: Plan, node: Mapping[str, Any], provided: Mapping[str, str]) -> Iterator[Finding]:
    """What of a plan does not suit the reward model that it names."""
    role = (plan.root.roles.get("reward") or {}).get("model") or {}
    adapter = str(node.get("adapter") or "")
    if adapter and role:
        yield Finding(f"{KEY} and {ROLE} both name the reward model", "leave one of them out")
    elif adapter:
        yield from _of_adapter(plan, adapter, provided)
    elif role:
        yield from _of_role(plan, role)
    if node.get("scale") == 0:
        yield Finding("reward.model.scale=0 makes all answers alike", "set reward.model.scale to another number")
    if (node.get("clip") or 0) < 0:
        yield Finding(f"reward.model.clip={node['clip']} bounds nothing", "set reward.model.clip above 0, or to 0")


def _of_role(plan: Plan, role: Mapping[str, Any]) -> Iterator[Finding]:
    path = str(role.get("path") or "")
    found = Files.of(path, str(role.get("checkpoint") or "latest"))
    if found is None:
        return  # no folder here: the model's own check says so, or a hub has it
    if found.checkpoint is not None and not found.place.is_dir():
        cure = f"set {KEY}={path} instead, where its base and adapter settings are the policy's; or merge it with"
        yield Finding(f"{ROLE}.path={path} holds an adapter alone", f"{cure} `loomtune export`, and name that folder")
        return
    yield from _head(found, f"{ROLE}.path={path}")
    yield from _rendering(plan, found, f"{ROLE}.path={path}")


def _head(found: Files, said: str) -> Iterator[Finding]:
    try:
        there = found.heads
    except ValueError as error:
        yield Finding(f"{said}: {error}", "export it again")
        return
    if f"{HEADS}{HEAD}.weight" not in there:
        what = f"{said} has no head '{HEAD}' in its {HEADS_FILE}: its scores would be drawn at random"
        yield Finding(what, "name a run with objective=reward, or what `loomtune export` made of one")


def _rendering(plan: Plan, found: Files, said: str) -> Iterator[Finding]:
    """Prompts have to be written as they were when the reward model was trained."""
    before, now = found.template, _template(plan)
    if before and before != now:
        what = f"{said} was trained with another chat template than the policy's"
        yield Finding(what, "set model.chat_template to that of the reward run")
    if found.run is None:
        what = f"{said} does not say with which {', '.join(RENDERING)} its prompts were written"
        yield Finding(what, "see that objective has the same; a run's own folder says it", fatal=False)
        return
    then, ours = Plan.load(found.run).chosen("objective"), plan.chosen("objective")
    for key in RENDERING:
        if then.get(key) != ours.get(key):
            what = f"{said} was trained with objective.{key}={then.get(key)!r}, and here it is {ours.get(key)!r}"
            yield Finding(what, f"set objective.{key} as it was")


def _of_adapter(plan: Plan, path: str, provided: Mapping[str, str]) -> Iterator[Finding]:
    try:
        found = worn(path)
        before = Plan.load(found.run) if found.run else plan
    except UserError as error:
        yield from (Finding(fault.what, fault.cure) for fault in error.faults)
        return
    said, own = f"{KEY}={path}", f"merge it with `loomtune export`, and set {ROLE}.path to that folder, or"
    if Trait.WHOLE_MODEL in provided:
        what = f"{provided[Trait.WHOLE_MODEL]} adds no adapter whose place another could take"
        yield Finding(what, f"{own} choose the reward run's adapter")
        return
    yield from _head(found, said)
    yield from _rendering(plan, found, said)
    then, now = dict(before.chosen("adapter")), dict(plan.chosen("adapter"))
    differing = [key for key in sorted(then | now) if key not in IDLE and then.get(key) != now.get(key)]
    for key in differing:
        what = f"{said} was trained with adapter.{key}={then.get(key)}, and the policy has {now.get(key)}"
        yield Finding(what, f"{own} set adapter as it was: only an adapter of the same layers takes its place")
    if not differing and now.get("init") and before.root.seed != plan.root.seed:
        what = f"{said} began with first values of seed {before.root.seed}, and the policy's are of {plan.root.seed}"
        yield Finding(what, f"{own} set seed={before.root.seed}, or leave adapter.init out")
    yield from _base(plan, found, said, own)


def _base(plan: Plan, found: Files, said: str, own: str) -> Iterator[Finding]:
    """Warned of is nothing where files are missing: the model's own check says so."""
    for axis in ("model", "adapter"):
        try:
            now = plan.build(installed(), axis).fingerprint()
        except (UserError, OSError):
            continue
        before = found.inputs(axis)
        if before and before != now:
            what = f"{said} was trained on another base: the files of {axis} are not those of the policy"
            yield Finding(what, f"{own} start the policy from what the reward run started from")


def _template(plan: Plan) -> str:
    try:
        model: Model = plan.build(installed(), "model")
        text = model.tokenizer().template
    except (UserError, OSError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest() if text else ""
