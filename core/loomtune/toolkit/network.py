"""A model, its adapter and its heads as one module with one forward, which is what sharding strategies wrap."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.contracts import Batch, EngineSpec, Reader, View
from loomtune.contracts.saved import HEADS, INNER
from loomtune.errors import UserError
from loomtune.toolkit.dropout import dropout_keys, replace_dropout
from loomtune.world import derive

PREFIX = "module."


class Reading(nn.Module):
    """Where readers run: a module of its own, called once in each pass of every rank.

    How often a reader calls a head follows from how many targets there are, which differs from rank to rank. A strategy
    that gathers parameters when their module is called gathers those of heads here.
    """

    def forward(self, states: Tensor, view: View, reader: Reader) -> Any:
        """states: those of the view, by themselves, where hooks look for tensors."""
        return reader(replace(view, states=states))


class Network(nn.Module):
    """What runs inside an engine's forward. All that needs whole parameters happens in `forward`, heads included."""

    def __init__(self, spec: EngineSpec) -> None:
        """Builds the skeleton and weaves the adapter in; parameters have no storage yet (torch's meta device)."""
        super().__init__()
        self.spec = spec
        with torch.device("meta"):
            skeleton = spec.model.skeleton()
            width = int(spec.model.head(skeleton).in_features)  # type: ignore[arg-type]
            scalars = [name for name in spec.heads if name != "lm"]
            self.heads = nn.ModuleDict({name: nn.Linear(width, 1, bias=False) for name in scalars})
        spec.adapter.meet(spec.model)
        self.module, self.source = spec.adapter.weave(skeleton, spec.model.weights(spec.seed), spec.seed)
        self.reading = Reading()
        replace_dropout(self.module, spec.seed)
        self._freeze()
        self._check_trained()

    def _freeze(self) -> None:
        """Nothing of a frozen network is trained, nor an `lm` head that nobody reads: its gradient would never come."""
        if self.spec.optimizer is None:
            self.requires_grad_(False)
        if "lm" in self.spec.heads:
            return
        names = [id(parameter) for _, parameter in self.base.named_parameters(remove_duplicate=False)]
        for parameter in self.spec.model.head(self.base).parameters():
            parameter.requires_grad_(parameter.requires_grad and names.count(id(parameter)) > 1)

    def _check_trained(self) -> None:
        """Raises UserError where a role is to be trained and nothing of it would be."""
        if self.spec.optimizer is not None and not any(parameter.requires_grad for parameter in self.parameters()):
            what = f"{type(self.spec.adapter).__name__} leaves nothing to train: it adds nothing and the base is frozen"
            raise UserError.of(what, "choose another adapter=, or settings of adapter. that train something")

    @property
    def read_heads(self) -> list[nn.Module]:
        """The heads that readers call."""
        return [self.heads[name] if name in self.heads else self.spec.model.head(self.base) for name in self.spec.heads]

    @property
    def base(self) -> nn.Module:
        """The model as its plugin made it."""
        return self.spec.adapter.base(self.module)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of activations."""
        return torch.bfloat16 if self.spec.precision == "bf16" else torch.float32

    def forward(self, batch: Batch, reader: Reader, adapter: bool) -> Any:
        """What the reader makes of the hidden states `(targets, width)` at the positions that predict."""
        with nullcontext() if adapter else self.spec.adapter.off(self.module):
            return self.read(batch, reader, adapter)

    def read(self, batch: Batch, reader: Reader, adapter: bool) -> Any:
        """The pass itself, with the adapter switched as it is asked for; who computes rows otherwise overrides it."""
        if not adapter:
            view = self.view(batch, self.attention(batch), slice(None))
            return self.reading(view.states, view, reader)
        given, attention = self.spec.adapter.inputs(self.module, batch, self.attention)
        with nullcontext() if given is batch else dropout_keys(given):
            view = self.view(given, attention, slice(None))
        return self.reading(view.states, view, reader)

    def attention(self, batch: Batch) -> Mapping[str, Any]:
        """What the kernel makes of a batch."""
        return self.spec.kernel.attention(batch, self.compute_dtype)

    def view(self, batch: Batch, attention: Mapping[str, Any], index: slice | Tensor) -> View:
        """What readers are shown. batch: what is computed here. attention: of what it may see. index: as in `View`."""
        spec, extras = self.spec, dict[str, Tensor]()
        hidden = spec.model.hidden(self.base, batch, attention, extras)
        predicting = hidden.flatten(0, 1).index_select(0, batch.predict_from)
        heads = {"lm": spec.model.head(self.base), **self.heads}
        return View(predicting, index, heads, extras, partial(spec.adapter.off, self.module))

    def plain(self) -> AbstractContextManager[nn.Module]:
        """Within it the base computes whole rows by itself, for generation."""
        return nullcontext(self.base)

    def initial(self, name: str, where: tuple[slice, ...] | None) -> Tensor:
        """A parameter's or saved buffer's first values, or a slice of them, by its name in this module."""
        if name.startswith(PREFIX):
            return self.source.read(name.removeprefix(PREFIX), where)
        trained = [other for other in self.source.shapes() if other.startswith(HEADS)]
        if name in trained:
            return self.source.read(name, where)
        if self.spec.optimizer is None:
            what = f"the files of a frozen network hold no {name}: drawn at random, it would say nothing"
            raise UserError.of(what, "set the role's model.path to what a run with objective=reward has trained")
        shape = self.get_parameter(name).shape
        if name.startswith(INNER):  # it foretells, where numbers that mean nothing are but noise
            scored = next((other for other in trained if not other.startswith(INNER)), None)
            drawn = self.source.read(scored) if scored else torch.zeros(shape)
        else:
            generator = torch.Generator().manual_seed(derive(self.spec.seed, name))
            drawn = torch.randn(shape, generator=generator) / shape[-1]
        return drawn if where is None else drawn[where]


def saved_name(name: str) -> str:
    """The name in checkpoints of a tensor of a network: the woven module's own; heads keep their prefix."""
    return name.removeprefix(PREFIX)
