"""Which layers of a model the user means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.errors import UserError
from loomtune_plugins.adapters.patterns import by_end, select

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
USUAL = ("proj", "attn", "fc", "dense", "query")
"""What the names of linear layers have in them, and those of no other matrices."""


def linear_layers(
    module: nn.Module, targets: Sequence[str], method: str, *, turned: bool = False
) -> dict[str, tuple[int, int]]:
    """Name to (input width, output width) of the linear layers that are meant, in the order of the module.

    turned: whether the method can adapt layers that keep their matrix the other way round, as GPT-2's do. Raises
    UserError for a target that matches nothing, and where there is nothing to adapt.
    """
    linear = every_linear(module, turned)
    find_head = getattr(module, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    inner = [name for name in linear if module.get_submodule(name) is not head]
    patterns = [target for target in targets if target != ALL_LINEAR]
    if not turned:
        _check_turned(module, targets, method)
    chosen = {*select("adapter.targets", patterns, list(linear), by_end, "linear layer")}
    if ALL_LINEAR in targets:
        chosen.update(inner)
    layers = {name: widths for name, widths in linear.items() if name in chosen}
    if not layers:
        raise UserError.of(
            f"adapter.targets={list(targets)} finds no linear layer in the model",
            f"use adapter=full: {method} can adapt linear layers only",
        )
    check_tied(module, chosen, "adapter.targets names", "leave it out of adapter.targets")
    return layers


def every_linear(module: nn.Module, turned: bool) -> dict[str, tuple[int, int]]:
    """Name to (input width, output width) of all linear layers. turned: those of GPT-2 too."""
    from torch import nn

    found = {
        name: (layer.in_features, layer.out_features)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return found | (turned_layers(module) if turned else {})


def turned_layers(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name to (input width, output width) of the layers of GPT-2's kind, whose matrix is `(inputs, outputs)`."""
    return {
        name: (layer.nx, layer.nf)
        for name, layer in module.named_modules()
        if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    }


def _check_turned(module: nn.Module, targets: Sequence[str], method: str) -> None:
    """A layer of GPT-2's kind looks like a linear one to the user, and must not be left out without a word."""
    found = [
        name for name in turned_layers(module) for target in targets if target == ALL_LINEAR or by_end(name, target)
    ]
    if found:
        raise UserError.of(
            f"adapter.targets means '{found[0]}', which keeps its matrix as GPT-2 does (Conv1D)",
            f"set adapter=lora, or adapter.targets to other layers: {method} adapts torch's linear layers only",
        )


def whole_modules(module: nn.Module, patterns: Sequence[str], adapted: Iterable[str]) -> list[str]:
    """The modules that are trained whole. Raises UserError where one cannot be."""
    names = [name for name, part in module.named_modules() if part._parameters and not list(part.children())]
    chosen = select("adapter.modules", patterns, names, by_end, "module with parameters of its own")
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    both = set(adapted)
    for name in chosen:
        if name in both:
            what = f"adapter.modules trains '{name}' whole, and adapter.targets adapts it"
            raise UserError.of(what, "leave it out of one of the two")
        tied = [other for p in module.get_submodule(name).parameters() for other in owners[id(p)] if other != name]
        if tied:
            raise UserError.of(
                f"adapter.modules trains '{name}' whole, whose weight is tied to that of {tied[0]}",
                "leave it out, name the rows that matter in adapter.tokens, or use adapter=full",
            )
    return chosen


def check_rank(key: str, rank: int, layers: Mapping[str, tuple[int, int]]) -> None:
    """Raises UserError where one of the layers, name to (input width, output width), cannot have the rank."""
    name, widths = min(layers.items(), key=lambda layer: min(layer[1]))
    if rank > min(widths):
        raise UserError.of(
            f"adapter.{key}={rank} is more than layer '{name}' ({widths[0]} to {widths[1]}) can have",
            f"set adapter.{key} to at most {min(widths)}, or leave the layer out of adapter.targets",
        )


def check_tied(module: nn.Module, chosen: set[str], says: str, cure: str) -> None:
    """A shared weight cannot be adapted in one place: merging would change the other, or tear them apart."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        ours = [name for name in shared if name.rpartition(".")[0] in chosen]
        if ours and len(shared) > 1:
            others = ", ".join(name for name in shared if name != ours[0])
            raise UserError.of(f"{says} '{ours[0].rpartition('.')[0]}', whose weight is tied to {others}", cure)


def shortest(layers: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The names by which a file says what was adapted: last parts where these mean the same layers, else whole names.

    peft takes a name to mean every module that ends with it; servers know layers by their last part.
    """
    wanted = set(layers)
    ends = {layer.rpartition(".")[2] for layer in wanted}
    meant = {module for module in modules if module.rpartition(".")[2] in ends}
    return sorted(ends if meant == wanted else wanted)


def briefest(chosen: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The names by which a file says what was trained whole: last parts where these mean the same modules.

    There, peft takes a name to mean every module whose name ends so, in the middle of a word too.
    """
    ends = tuple({name.rpartition(".")[2] for name in chosen})
    return sorted(ends if set(chosen) == {name for name in modules if name.endswith(ends)} else chosen)


def enough(stored: Mapping[str, tuple[int, ...]], targets: Sequence[str], rank: int) -> bool:
    """True where the names and shapes in a model's files show that every target means linear layers of that rank.

    Only matrices of repeated blocks with names that linear layers bear are believed; of all else the skeleton judges.
    """
    inner = {
        name.removesuffix(".weight"): shape
        for name, shape in stored.items()
        if name.endswith(".weight") and len(shape) == 2 and any(part.isdecimal() for part in name.split("."))
    }
    usual = [name for name in inner if any(word in name.rpartition(".")[2] for word in USUAL)]
    patterns = [target for target in targets if target != ALL_LINEAR]
    meant = [name for name in inner if ALL_LINEAR in targets or any(by_end(name, target) for target in patterns)]
    return (
        bool(targets and meant and usual)
        and all(any(by_end(name, target) for name in usual) for target in patterns)
        and not {name for name in meant if ALL_LINEAR not in targets} - set(usual)
        and all(rank <= min(inner[name]) for name in meant)
    )
