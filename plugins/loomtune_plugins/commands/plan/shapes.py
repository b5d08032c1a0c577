"""Models that are not at hand: a plan needs their shape alone, which is shipped, or lies in the hub's cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from loomtune.catalogue import Catalogue
from loomtune.contracts import Model
from loomtune.errors import UserError
from loomtune.plan import Plan

SHAPES = "random"
"""The offer that builds any architecture without its weights."""


@dataclass(frozen=True, slots=True)
class Shaped:
    """A plan that can be rehearsed here. shape: by which the policy is planned, or empty. notes: what to say of it."""

    plan: Plan
    shape: str = ""
    notes: tuple[str, ...] = ()


def shaped(plan: Plan, catalogue: Catalogue) -> Shaped:
    """The plan with shapes in place of models that are not at hand, and then of all: roles follow the policy.

    Raises UserError where a model is neither at hand nor shipped.
    """
    policy = dict(plan.chosen("model"))
    given = {role: node["model"] for role, node in plan.root.roles.items() if node.get("model")}
    policy |= _downloaded(policy)
    given = {role: {**own, **_downloaded(own)} for role, own in given.items()}
    nodes = {"": policy, **{role: {**policy, **own} for role, own in given.items()}}
    models: dict[str, Model] = {role: catalogue.build("model", policy["name"], node) for role, node in nodes.items()}
    if all(model.at_hand() for model in models.values()):
        return Shaped(_with(plan, policy, given))
    found = {role: _shape(model, nodes[role], f"roles.{role}." if role else "") for role, model in models.items()}
    known = {field.name for field in fields(catalogue.find("model", SHAPES).offer.schema)}
    base = asdict(catalogue.find("model", SHAPES).offer.schema())
    kept = {key: value for key, value in policy.items() if key in known}
    policy = {**base, **kept, **found[""].settings, "name": SHAPES}
    plan = _with(plan, policy, {role: found[role].settings for role in given})
    notes = tuple(one.note for one in found.values() if one.note)
    return Shaped(plan, found[""].name, notes)


def _with(plan: Plan, policy: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan with other settings of its models. given: of roles."""
    roles = {role: {**plan.root.roles[role], "model": dict(own)} for role, own in given.items()}
    settings = {**plan.settings, "model": dict(policy), "roles": {**plan.root.roles, **roles}}
    return replace(plan, settings=settings)


@dataclass(frozen=True, slots=True)
class _Shape:
    name: str
    settings: Mapping[str, Any]
    note: str


def _shape(model: Model, node: Mapping[str, Any], where: str) -> _Shape:
    if model.at_hand():
        return _Shape("", {"config": node.get("config") or model.origin, "shape": node.get("shape") or {}}, "")
    model.find()  # a folder that is not there is a mistake, not a model elsewhere
    origin = model.origin
    known = dict(shipped())
    for name, said in known.items():
        if origin in (said.get("origin") or ()):
            note = f"{where}model.path={origin} is not here; planned by model={name}"
            return _Shape(name, {"config": "", "shape": _whole(name, known)}, note)
    what = f"{where}model.path={origin} is not here, and no shape of that origin is shipped"
    names = ", ".join(name for name, said in known.items() if said.get("origin"))
    cure = f"download it once, or choose a shape: model=random model.config=config.json, or model= one of {names}"
    raise UserError.of(what, cure)


def shipped() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and values of each config in the group `model`, loomtune's own first, then the plugins'."""
    from loomtune.catalogue import installed

    for source in ("pkg://loomtune_conf", *installed().configs):
        for file in sorted(_folder(source).iterdir(), key=lambda one: one.name) if _folder(source).is_dir() else ():
            if file.name.endswith(".yaml"):
                yield file.name.removesuffix(".yaml"), yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _whole(name: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A shape, with what it has from the one that it begins with."""
    begins = [one for one in known[name].get("defaults", ()) if one in known]
    base = _whole(begins[0], known) if begins else {}
    return {**base, **known[name].get("shape", {})}


def _folder(source: str) -> Traversable:
    scheme, _, rest = source.partition("://")
    root: Traversable = files(rest.replace("/", ".")) if scheme == "pkg" else Path(rest)
    return root / "model"


def _downloaded(node: Mapping[str, Any]) -> dict[str, str]:
    """Where the files of a hub id lie that were downloaded before; no network is asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = str(node.get("path") or "")
    if "/" not in path or Path(path).expanduser().exists():
        return {}
    try:
        found = try_to_load_from_cache(path, "config.json", revision=node.get("revision") or None)
    except HFValidationError:
        return {}
    return {"path": str(Path(found).parent)} if isinstance(found, str) else {}
