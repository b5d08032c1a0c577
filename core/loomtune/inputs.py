"""What a run began from in files that no checkpoint holds: whoever opens it later must find them as they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from loomtune.catalogue import Catalogue
from loomtune.contracts import Adapter, Model, Reward
from loomtune.errors import Fault, UserError
from loomtune.plan import Plan
from loomtune.role_models import models

FILE = "inputs.json"
TEMPLATE = "model.chat_template"


def fingerprints(plan: Plan, catalogue: Catalogue, *, roles: bool = True) -> dict[str, str]:
    """A digest of what reads files, by the setting that names them: the text of `inputs.json`.

    roles: False leaves out those beside the policy, of which nothing is asked where it alone leaves.
    """
    model: Model = plan.build(catalogue, "model")
    parts: dict[str, Model | Adapter | Reward] = {"model": model, "adapter": plan.build(catalogue, "adapter")}
    template = model.tokenizer().template
    said = {TEMPLATE: hashlib.sha256(template.encode()).hexdigest()} if template else {}
    if roles:
        parts |= {f"reward.{name}": reward for name, reward in plan.build(catalogue, "reward").items()}
        parts |= {f"roles.{role}.model": model for role, model in models(plan, catalogue).items()}
    return {key: part.fingerprint() for key, part in parts.items()} | said


def check(folder: Path, now: Mapping[str, str]) -> None:
    """Raises UserError naming what is not as it was. A folder that does not say what it began from is accepted."""
    if not (folder / FILE).is_file():
        return
    before = json.loads((folder / FILE).read_text())
    cure = "restore the files, or begin another run: choose another run.dir"
    faults = [
        Fault(f"the run in {folder} began from other files of {key}: they were changed since", cure)
        for key, digest in now.items()
        if before.get(key, digest) != digest
    ]
    if faults:
        raise UserError(*faults)
