"""Which layers of a model the user means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from loomtune.errors import UserError
from loomtune_plugins.adapters.patterns import by_end, select

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"


def linear_layers(module: nn.Module, targets: Sequence[str], method: str) -> dict[str, tuple[int, int]]:
    """Name to (input width, output width) of the linear layers that are meant, in the order of the module.

    Raises UserError for a target that matches nothing, and where there is nothing to adapt.
    """
    from torch import nn

    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    find_head = getattr(module, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    inner = [name for name, layer in linear.items() if layer is not head]
    patterns = [target for target in targets if target != ALL_LINEAR]
    chosen = {*select("adapter.targets", patterns, list(linear), by_end, "linear layer")}
    if ALL_LINEAR in targets:
        chosen.update(inner)
    layers = {name: (layer.in_features, layer.out_features) for name, layer in linear.items() if name in chosen}
    if not layers:
        raise UserError.of(
            f"adapter.targets={list(targets)} finds no linear layer in the model",
            f"use adapter=full: {method} can adapt linear layers only",
        )
    _check_tied(module, chosen)
    return layers


def _check_tied(module: nn.Module, chosen: set[str]) -> None:
    """A shared weight cannot be adapted in one place: merging would change the other, or tear them apart."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        ours = [name for name in shared if name.rpartition(".")[0] in chosen]
        if ours and len(shared) > 1:
            others = ", ".join(name for name in shared if name != ours[0])
            raise UserError.of(
                f"adapter.targets names '{ours[0].rpartition('.')[0]}', whose weight is tied to {others}",
                "leave it out of adapter.targets",
            )


def shortest(layers: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The names by which a file says what was adapted: last parts where these mean the same layers, else whole names.

    peft takes a name to mean every module that ends with it; servers know layers by their last part.
    """
    wanted = set(layers)
    ends = {layer.rpartition(".")[2] for layer in wanted}
    meant = {module for module in modules if module.rpartition(".")[2] in ends}
    return sorted(ends if meant == wanted else wanted)
