"""Roles that are another network than the policy's: what `roles.<role>.model.<setting>` says of them.

Such a model is made by the policy's plugin, of the policy's settings but for those that are given. It has no adapter,
and is laid out as the policy is. All but a trained twin (a value model) are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from loomtune.catalogue import Catalogue, typed
from loomtune.errors import Fault, UserError, near

if TYPE_CHECKING:
    from loomtune.contracts import Model, Objective, Tokenizer
    from loomtune.plan import Plan


def misfits(settings: Mapping[str, Any], catalogue: Catalogue) -> Iterator[Fault]:
    """What of `roles` no schema knows."""
    for role, node in (settings.get("roles") or {}).items():
        for key in sorted(set(node) - {"model"} if isinstance(node, dict) else [""]):
            what = f"there is no setting 'roles.{role}{key and '.'}{key}'.{near(key, ['model'])}"
            yield Fault(what, f"set roles.{role}.model.<setting>, as of model")
        if isinstance(node, dict) and "model" in node:
            yield from _misfits(f"roles.{role}.model", node["model"], settings.get("model") or {}, catalogue)


def _misfits(where: str, given: Any, model: Mapping[str, Any], catalogue: Catalogue) -> Iterator[Fault]:
    from omegaconf.errors import OmegaConfBaseException

    if model.get("name") not in catalogue.names("model"):
        return  # which is told by itself
    schema = catalogue.find("model", model["name"]).offer.schema
    known = [entry.name for entry in fields(schema)]
    unknown = sorted(set(given) - set(known)) if isinstance(given, dict) else [str(given)]
    for key in unknown:
        yield Fault(f"there is no setting '{where}.{key}'.{near(key, known)}", f"there are: {', '.join(known)}")
    if not unknown:
        try:
            typed(schema, {**model, **given})
        except OmegaConfBaseException as error:
            yield Fault(f"{where}: {str(error).splitlines()[0]}", "mend that value")


def models(plan: Plan, catalogue: Catalogue) -> dict[str, Model]:
    """The models that were given, by role."""
    policy = plan.choices("model")
    given = {role: node["model"] for role, node in plan.root.roles.items() if node.get("model")}
    chosen = next(iter(policy.values()), None)
    if chosen is None:
        return {}
    return {role: catalogue.build("model", chosen["name"], {**chosen, **own}) for role, own in given.items()}


def check(plan: Plan, objective: Objective) -> None:
    """Raises UserError where a role is given a model that has no use for it, and where one lacks its own."""
    faults = list(_faults(plan.root.roles, objective, str(plan.chosen("objective")["name"])))
    if faults:
        raise UserError(*faults)


def _faults(given: Mapping[str, Any], objective: Objective, chosen: str) -> Iterator[Fault]:
    wanted = objective.roles()
    own = [name for name, role in wanted.items() if name != "policy" and role.twin_of is None]
    for name in given:
        if name == "policy":
            yield Fault("roles.policy is what is trained", "set model.<setting>")
        elif name in wanted and name not in own and (wanted[name].shares or not wanted[name].trained):
            yield Fault(f"roles.{name} starts from the policy's own model", f"leave roles.{name} out")
        elif name not in wanted:
            what = f"objective={chosen} has no role '{name}'.{near(name, own)}"
            yield Fault(what, f"set {' or '.join(f'roles.{one}.model.path' for one in own)}" if own else "leave it out")
    for name in own:
        if not given.get(name, {}).get("model"):
            yield Fault(f"objective={chosen} needs a model as its {name}", f"set roles.{name}.model.path=<model>")


def suit(others: Mapping[str, Model], tokenizer: Tokenizer, length: int) -> None:
    """Raises UserError where a role's model does not read the policy's tokens, or not so many."""
    faults = []
    for role, model in others.items():
        if model.tokenizer().fingerprint != tokenizer.fingerprint:
            what = f"roles.{role}.model has another tokenizer than model: the same token means something else to it"
            faults.append(Fault(what, f"set roles.{role}.model.path to a model of the same family, with its tokenizer"))
        if model.context() < length:
            what = f"roles.{role}.model reads at most {model.context()} tokens, and rows have up to {length}"
            faults.append(Fault(what, f"set max_length to at most {model.context()}"))
    if faults:
        raise UserError(*faults)
