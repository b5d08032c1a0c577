"""What became of a model's tensors once peft has wrapped its layers, and what was added to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loomtune.contracts import WeightSource
from loomtune.contracts.saved import HEADS
from loomtune.contracts.sharding import Region
from loomtune_plugins.adapters.wrapped.wrapping import NAME

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Added:
    """A parameter that the adapter brings. layer: the base's name of what it belongs to. part: `lora_A`, `ia3_l`."""

    layer: str
    part: str
    adapter: str = NAME


@dataclass(slots=True)
class Names:
    """Of every tensor of a woven module: its name in the base, or what was added; and its name in peft's files."""

    base: dict[str, str] = field(default_factory=dict)
    added: dict[str, Added] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def trains(self, name: str) -> bool:
        """True for what the one adapter that is trained has added."""
        return (added := self.added.get(name)) is not None and added.adapter == NAME


def owners(module: nn.Module) -> dict[int, str]:
    """Which module has which name, before anything is wrapped: peft moves modules, it does not copy them."""
    return {id(part): name for name, part in module.named_modules()}


def names(woven: Any, before: Mapping[int, str]) -> Names:
    """What the tensors of a woven module are. before: `owners` of the module that was wrapped."""
    found = Names()
    for path, part in woven.named_modules():
        tensors = {**part._parameters, **part._buffers}
        passing = part._non_persistent_buffers_set
        for leaf in [key for key in tensors if tensors[key] is not None and key not in passing]:
            if (owner := before.get(id(part))) is not None:
                found.base[_joined(path, leaf)] = _joined(owner, leaf)
            else:
                found.added[_joined(path, leaf)] = _added(woven, path, leaf, before)
    found.files = files(woven, found, NAME)
    return found


def files(woven: Any, found: Names, adapter: str) -> dict[str, str]:
    """Names in peft's files, by those in the woven module, of what one adapter has added."""
    from peft import get_peft_model_state_dict

    if adapter != NAME:
        # peft 0.21 raises KeyError for an adapter beside one that trains rows of tokens. What is not trained here is
        # plain, and of that peft's files leave the adapter's name out and nothing else.
        mine = (name for name, added in found.added.items() if added.adapter == adapter)
        return {name: name.replace(f".{adapter}.", ".") for name in mine}
    tensors = woven.state_dict(keep_vars=True)
    ours = {id(tensor): name for name, tensor in tensors.items() if name in found.added}
    saved = get_peft_model_state_dict(woven, state_dict=tensors, adapter_name=adapter, save_embedding_layers=False)
    return {ours[id(tensor)]: file for file, tensor in saved.items() if id(tensor) in ours}


def _added(woven: nn.Module, path: str, leaf: str, before: Mapping[int, str]) -> Added:
    """By the innermost module around it that wraps one of the base's: `LAYER.PART.ADAPTER...`."""
    name = _joined(path, leaf)
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        around = woven.get_submodule(".".join(parts[:end])) if end < len(parts) - leaf.count(".") else woven
        for wrapped in ("base_layer", "original_module"):
            inner = getattr(around, wrapped, None)
            if inner is not None and id(inner) in before:
                rest = parts[end:]
                return Added(before[id(inner)], rest[0], rest[1] if len(rest) > 1 else NAME)
    raise AssertionError(f"{name} belongs to no wrapped layer")


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


First = Callable[[str, Added, tuple[int, ...]], "Tensor"]
"""(name, what it is, whole shape) -> first values of what was added, whole."""


class WovenWeights(WeightSource):
    """The base's tensors under their names in the woven module, and first values of what was added."""

    def __init__(self, base: WeightSource, woven: nn.Module, found: Names, first: First) -> None:
        self._base, self._names, self._first = base, found, first
        there = base.shapes()
        self._shapes = {name: there[known] for name, known in found.base.items() if known in there}
        # Scalar heads lie outside of what peft wraps.
        self._shapes |= {name: shape for name, shape in there.items() if name.startswith(HEADS)}
        tensors = woven.state_dict(keep_vars=True)
        self._added = {name: tuple(tensors[name].shape) for name in found.added}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes as in the woven module."""
        return self._shapes | self._added

    def read(self, name: str, where: Region | None = None) -> Tensor:
        """The tensor or the slice of it; what was added in fp32.

        That is made whole and then cut: it is small, and a slice is then the same on every world size.
        """
        if (added := self._names.added.get(name)) is None:
            return self._base.read(self._names.base.get(name, name), where)
        whole = self._first(name, added, self._added[name])
        return whole if where is None else whole[where].clone()


class Nowhere(WeightSource):
    """No weights: of a model that is looked at and not used."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """None."""
        return {}

    def read(self, name: str, where: Region | None = None) -> Tensor:
        """Nothing can be read."""
        raise KeyError(name)
