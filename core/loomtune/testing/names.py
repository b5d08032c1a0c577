"""TRL's names of settings, and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OWN = {
    "f_divergence_type": "divergence",
    "f_alpha_divergence_coef": "divergence_alpha",
    "ld_alpha": "tail",
    "use_weighting": "weighting",
    "center_rewards_coefficient": "center",
    "desirable_weight": "desirable",
    "undesirable_weight": "undesirable",
}
"""Theirs to ours, of objectives."""

VALUES = {"js_divergence": "js", "alpha_divergence": "alpha"}
"""Theirs to ours, of divergences."""

OF_LOSSES = {
    "label_smoothing": "label_smoothing",
    "discopop_tau": "tau",
    "simpo_gamma": "gamma",
    "gamma": "gamma",
    "alpha": "alpha",
    "delta": "delta",
}
"""Theirs to ours, of losses: each goes to the losses that have it."""


def translated(
    objective: str, settings: Mapping[str, Any], brings: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of the objective, and of each loss by its name. brings: the losses where none is named."""
    left = dict(settings)
    if objective == "kto" and "loss_type" in left:
        left["variant"] = left.pop("loss_type")
    left.pop("lmbda", None)  # says how many rows of a run the policy writes itself, and a batch is there already
    named = left.pop("loss_type", None)
    weights = left.pop("loss_weights", None)
    names = [named] if isinstance(named, str) else list(named or brings)
    losses: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, weight in zip(names, weights or (), strict=bool(weights)):
        losses[name]["weight"] = float(weight)
    if objective == "cpo":
        losses.setdefault("sft", {})["weight"] = float(left.pop("cpo_alpha", 1.0))
    if objective == "orpo" and "likelihood" not in left:
        left["likelihood"] = "all"  # as TRL counts
    for theirs, ours in OF_LOSSES.items():
        if theirs in left:
            value = left.pop(theirs)
            for name in names:
                losses[name] |= {ours: value} if ours in _known(name) else {}
    values = {key: VALUES.get(value, value) if isinstance(value, str) else value for key, value in left.items()}
    return {OWN.get(key, key): value for key, value in values.items()}, losses


def _known(loss: str) -> set[str]:
    """The settings of a loss."""
    from dataclasses import fields

    from loomtune.catalogue import installed

    return {field.name for field in fields(installed().find("loss", loss).offer.schema)}
