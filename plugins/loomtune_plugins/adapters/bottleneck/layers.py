"""The modules that bottleneck adapters add, and how they come to be called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.errors import UserError
from loomtune.world import derive
from loomtune_plugins.adapters.bottleneck import places as bottleneck_places
from loomtune_plugins.adapters.bottleneck.settings import ATTENTION, BLOCK, MLP
from loomtune_plugins.adapters.patterns import by_start, select

FUNCTIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
STD = 1e-2
"""Of the first values of `down`, as Houlsby et al. draw them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Which function is added, and where. layers: numbers of the blocks. size: width of the bottleneck."""

    variant: str
    size: int
    activation: str
    scaling: float
    layers: tuple[int, ...]
    dropout: float = 0.0


class Bottleneck(nn.Module):
    """`x + dropout(scaling * up(activation(down(x))))`, position by position."""

    def __init__(self, width: int, form: Form) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, form.size), nn.Linear(form.size, width)
        self.activation = FUNCTIONS[form.activation]()
        self.dropout = nn.Dropout(form.dropout)
        self.scaling = form.scaling
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        """x: `(..., width)`; the same shape and type."""
        # A base in bf16 may carry an adapter in fp32.
        added = self.up(self.activation(self.down(x.to(self.down.weight.dtype))))
        result: Tensor = x + self.dropout(self.scaling * added).to(x.dtype)
        return result

    def follow(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook: in the place of a layer's output, or of the first of several, what this makes of it."""
        if not self.active:
            return None
        if isinstance(output, tuple | list):
            return type(output)([self(output[0]), *output[1:]])
        return self(output)


def numbers(layers: Sequence[str], count: int) -> tuple[int, ...]:
    """The blocks that patterns mean, all where there is none. Raises UserError for one that means no block."""
    known = [str(number) for number in range(count)]
    chosen = select("adapter.layers", layers, known, by_start, "block") if layers else known
    return tuple(map(int, chosen))


def found(module: nn.Module, form: Form) -> list[bottleneck_places.Place]:
    """Where the modules belong. Raises UserError where that is not certain, or a block is missing or taken."""
    listed = bottleneck_places.blocks(module)
    if missing := [number for number in form.layers if number >= len(listed)]:
        raise UserError.of(
            f"the adapter is for block {missing[0]}, and the model has {len(listed)}",
            "set model.path to the model that the adapter was trained on",
        )
    chosen = [listed[number] for number in form.layers]
    if any(hasattr(block, name) for block in chosen for name in (ATTENTION, MLP, BLOCK)):
        raise UserError.of("the model has a bottleneck adapter already", "begin with a model that carries none")
    return [place for block in chosen for place in bottleneck_places.places(block, form.variant)]


def insert(module: nn.Module, form: Form) -> dict[str, tuple[int, ...]]:
    """Adds the modules, without values, on the devices of their blocks; names and shapes of what was added."""
    width, places = bottleneck_places.width(module), found(module, form)
    for place in places:
        with torch.device("meta"):  # nothing is drawn: values come from elsewhere
            added = Bottleneck(width, form)
        if (device := next(chain(place.owner.parameters(), place.owner.buffers())).device).type != "meta":
            added.to_empty(device=device)
        place.owner.add_module(place.name, added.train(place.owner.training))
        place.after.register_forward_hook(added.follow)
    return {
        f"{path}.{leaf}": tuple(parameter.shape)
        for path, part in module.named_modules()
        if isinstance(part, Bottleneck)
        for leaf, parameter in part.named_parameters()
    }


def bottlenecks(module: nn.Module) -> list[Bottleneck]:
    """Those of a woven module."""
    return [part for part in module.modules() if isinstance(part, Bottleneck)]


@contextmanager
def inert(module: nn.Module) -> Iterator[None]:
    """Within it they are not called."""
    before = [(part, part.active) for part in bottlenecks(module)]
    try:
        for part, _ in before:
            part.active = False
        yield
    finally:
        for part, was in before:
            part.active = was


def first(name: str, shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensor:
    """First values: `up` of zeros, so that the model starts as its base; `down` truncated at two deviations."""
    tensor = torch.zeros(shapes[name])
    if not name.endswith("down.weight"):
        return tensor
    generator = torch.Generator().manual_seed(derive(seed, name))
    return nn.init.trunc_normal_(tensor, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
