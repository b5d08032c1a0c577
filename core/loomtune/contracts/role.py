"""A role is a view of an engine: which network, with its adapter on or off, read through which head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loomtune.contracts.batch import Batch
from loomtune.contracts.model import Head

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune.contracts.sharding import Engine


@dataclass(frozen=True, slots=True)
class View:
    """What a reader sees of a forward pass, inside it, where sharded parameters are whole.

    states: `(n, width)` hidden states at the positions that predict the targets `index` of the batch. An engine may
    show the targets in parts (a slice or `(n,)` positions each); it joins what the reader makes of them.
    heads: output heads by name, to be called as modules. extras: what the model says besides (router logits).
    bare: within it heads compute as they do without the adapter.
    """

    states: Tensor
    index: slice | Tensor
    heads: Mapping[Head, nn.Module]
    extras: Mapping[str, Tensor]
    bare: Callable[[], AbstractContextManager[None]] = nullcontext


Reader = Callable[[View], Any]
"""What is wanted of a forward pass: from a view, a tensor or a mapping of them, with one row for each target shown."""


@dataclass(frozen=True, slots=True)
class Role:
    """How an objective meets a model.

    With LoRA, `policy` and `reference` are two roles of one engine, the second with `adapter=False`; a value model that
    shares the policy's base is a third, with another head. So one base is in memory, not four.
    trained: a role that is not is always read without dropout and without gradient.
    """

    name: str
    engine: Engine
    adapter: bool = True
    head: Head = "lm"
    trained: bool = True

    def read(self, batch: Batch, reader: Reader) -> Any:
        """Runs the network over a batch and gives what the reader makes of the predicting hidden states."""
        if self.trained:
            return self.engine.forward(batch, reader, adapter=self.adapter)
        with self.engine.evaluating():
            return self.engine.forward(batch, reader, adapter=self.adapter)
