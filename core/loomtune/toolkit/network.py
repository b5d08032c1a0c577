"""A model, its adapter and its heads as one module with one forward, which is what sharding strategies wrap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loomtune.contracts import Batch, EngineSpec, Reader, View
from loomtune.errors import UserError
from loomtune.toolkit.dropout import dropout_keys, replace_dropout
from loomtune.toolkit.linear import quicken
from loomtune.toolkit.sequence import Exchange, Share
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

    def __init__(self, spec: EngineSpec, sequence: dist.ProcessGroup | None = None) -> None:
        """Builds the skeleton and weaves the adapter in; parameters have no storage yet (torch's meta device).

        sequence: the ranks that compute the same rows, each a stretch of them. Each then has a part of every gradient,
        and the sum over all of them is the true one. Raises UserError where the model cannot be cut so.
        """
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
        quicken(self.module)
        self._freeze()
        self._check_trained()
        self.exchange = Exchange(sequence) if sequence is not None else None
        if self.exchange is not None:
            spec.model.exchange_attention(self.base, self.exchange)

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
            if self.exchange is not None:
                return self._in_stretches(batch, reader, self.exchange)
            if not adapter:
                view = self._view(batch, self._attention(batch), slice(None))
                return self.reading(view.states, view, reader)
            given, attention = self.spec.adapter.inputs(self.module, batch, self._attention)
            with nullcontext() if given is batch else dropout_keys(given):
                view = self._view(given, attention, slice(None))
            return self.reading(view.states, view, reader)

    def _attention(self, batch: Batch) -> Mapping[str, Any]:
        return self.spec.kernel.attention(batch, self.compute_dtype)

    def _in_stretches(self, batch: Batch, reader: Reader, exchange: Exchange) -> Any:
        """The same, where this rank computes a stretch of each row; the reader sees the targets predicted there."""
        share = Share.of(batch, exchange)
        with dropout_keys(share.mine):
            view = self._view(share.mine, self._attention(share.whole), share.index)
        if view.extras:
            raise UserError.of(
                f"the model's {', '.join(view.extras)} cannot be put together from stretches of rows",
                "set sharding.sequence=1",
            )
        return share.join(self.reading(view.states, view, reader), view.states)

    def _view(self, batch: Batch, attention: Mapping[str, Any], index: slice | Tensor) -> View:
        """batch: what is computed here. attention: made of what it may see."""
        spec, extras = self.spec, dict[str, Tensor]()
        hidden = spec.model.hidden(self.base, batch, attention, extras)
        predicting = hidden.flatten(0, 1).index_select(0, batch.predict_from)
        heads = {"lm": spec.model.head(self.base), **self.heads}
        return View(predicting, index, heads, extras, partial(spec.adapter.off, self.module))

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        """Within it the base computes whole rows by itself, for generation."""
        if self.exchange is None:
            yield self.base
            return
        self.spec.model.exchange_attention(self.base, None)
        try:
            yield self.base
        finally:
            self.spec.model.exchange_attention(self.base, self.exchange)

    def initial(self, name: str, where: tuple[slice, ...] | None) -> Tensor:
        """A parameter's or saved buffer's first values, or a slice of them, by its name in this module."""
        if name.startswith(PREFIX):
            return self.source.read(name.removeprefix(PREFIX), where)
        if name in self.source.shapes():
            return self.source.read(name, where)
        shape = self.get_parameter(name).shape
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(derive(self.spec.seed, name))) / shape[-1]
        return drawn if where is None else drawn[where]


def saved_name(name: str) -> str:
    """The name in checkpoints of a tensor of a network: the woven module's own; heads keep their prefix."""
    return name.removeprefix(PREFIX)
