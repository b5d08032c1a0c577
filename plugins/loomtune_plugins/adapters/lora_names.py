"""Names of parameters once peft has wrapped a model, and what they were before."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from loomtune.contracts.saved import HEADS

PREFIX = "base_model.model."
"""What peft puts before every name of the model."""
BASE = ".base_layer."
"""What peft puts between a wrapped layer and its own parameters."""

_ADDED = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)\.default\.weight")


class Added(NamedTuple):
    """What an added parameter is. layer: its linear layer's name in the base."""

    layer: str
    part: str


def added(name: str) -> Added | None:
    """What the adapter's parameter of that name is, or None for a parameter of the base."""
    match = _ADDED.fullmatch(name.removeprefix(PREFIX))
    return Added(match["layer"], match["part"]) if match else None


def woven_name(name: str, layers: Iterable[str]) -> str:
    """The name of a base tensor in the woven module. layers: the wrapped ones."""
    if name.startswith(HEADS):  # they lie outside of what peft wraps
        return name
    layer, _, leaf = name.rpartition(".")
    return f"{PREFIX}{layer}{BASE}{leaf}" if layer in layers else f"{PREFIX}{name}"


def base_name(name: str) -> str:
    """The name in the base of a base tensor of the woven module."""
    return name.removeprefix(PREFIX).replace(BASE, ".")


def saved_name(name: str) -> str:
    """The name in peft's files, which leave out what the adapter is called within the module."""
    part = added(name)
    assert part is not None, f"{name} is no parameter of the adapter"
    end = "" if part.part == "lora_magnitude_vector" else ".weight"
    return f"{PREFIX}{part.layer}.{part.part}{end}"


def shortest(layers: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The names by which a file says what was adapted: last parts where these mean the same layers, else whole names.

    peft takes a name to mean every module that ends with it; servers know layers by their last part.
    """
    wanted = set(layers)
    ends = {layer.rpartition(".")[2] for layer in wanted}
    meant = {module for module in modules if module.rpartition(".")[2] in ends}
    return sorted(ends if meant == wanted else wanted)
