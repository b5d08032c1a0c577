"""A network whose rows are cut over ranks, each of which computes a stretch of every row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from loomtune.contracts import Batch, EngineSpec, Reader
from loomtune.errors import UserError
from loomtune.toolkit.dropout import dropout_keys
from loomtune.toolkit.network import Network
from loomtune_plugins.shardings.sequence import Share, Ulysses


class Stretched(Network):
    """Each rank of the group has a part of every gradient, and the sum over all of them is the true one."""

    def __init__(self, spec: EngineSpec, group: dist.ProcessGroup) -> None:
        """group: the ranks that compute the same rows. Raises UserError where the model cannot be cut so."""
        super().__init__(spec)
        self.exchange = Ulysses(group)
        spec.model.exchange_attention(self.base, self.exchange)

    def read(self, batch: Batch, reader: Reader, adapter: bool) -> Any:
        """The reader sees the targets that are predicted in this rank's stretch."""
        share = Share.of(batch, self.exchange)
        with dropout_keys(share.mine):
            view = self.view(share.mine, self.attention(share.whole), share.index)
        if view.extras:
            raise UserError.of(
                f"the model's {', '.join(view.extras)} cannot be put together from stretches of rows",
                "set sharding.sequence=1",
            )
        return share.join(self.reading(view.states, view, reader), view.states)

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        """Takes the exchange away."""
        self.spec.model.exchange_attention(self.base, None)
        try:
            yield self.base
        finally:
            self.spec.model.exchange_attention(self.base, self.exchange)
