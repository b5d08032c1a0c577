"""A role is a view of an engine: which network, with its adapter on or off, read through which head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loomtune.contracts.batch import Batch
from loomtune.contracts.model import Head

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune.contracts.sharding import Engine

Reader = Callable[["Tensor", "nn.Module"], "Tensor"]
"""What is wanted of a forward pass: from the hidden states *at the positions that predict* `(targets, width)` and the
head, makes a tensor. It runs inside the engine's forward, where sharded parameters are whole."""


@dataclass(frozen=True, slots=True)
class Role:
    """How an objective meets a model.

    With LoRA, `policy` and `reference` are two roles of one engine, the second with `adapter=False`; a value model that
    shares the policy's base is a third, with another head. So one base is in memory, not four.
    """

    name: str
    engine: Engine
    adapter: bool = True
    head: Head = "lm"

    def read(self, batch: Batch, reader: Reader) -> Tensor:
        """Runs the network over a batch and gives what the reader makes of the predicting hidden states."""
        return self.engine.forward(batch, reader, head=self.head, adapter=self.adapter)
