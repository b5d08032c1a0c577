"""Rows that an embedding and a head need beyond those that their files hold."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from loomtune.contracts.sharding import Region
from loomtune_plugins.models.pieces import Piece, region

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 2**24
"""Numbers that are held at once while a mean is taken."""


class Grown(Piece):
    """A tensor with more rows, each the mean of those that there are.

    So a new token begins as likely as others are, and does not take over what the model says: Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models". The mean is over all stored rows, whatever slice
    is read, and so the same in every layout.
    """

    def __init__(self, piece: Piece, rows: int) -> None:
        self._piece = piece
        self.shape = (rows, *piece.shape[1:])

    def read(self, where: Region) -> Tensor:
        """Takes the mean when a new row is first read; who reads none has not to."""
        stored, wanted = self._piece.shape[0], where[0]
        inside = slice(wanted.start, max(wanted.start, min(wanted.stop, stored)), wanted.step)
        known, all_ = (len(range(part.start, part.stop, part.step)) for part in (inside, wanted))
        if known == all_:
            return self._piece.read((inside, *where[1:]))
        mean = self._mean[where[1:]]
        rows = mean.expand(all_ - known, *mean.shape)
        return torch.cat([self._piece.read((inside, *where[1:])), rows]) if known else rows.clone()

    @cached_property
    def _mean(self) -> Tensor:
        """`(width,)`, summed in float64 some rows at a time, in the stored type."""
        rows, step = self._piece.shape[0], max(1, AT_ONCE // math.prod(self._piece.shape[1:]))
        total: Any = 0
        for start in range(0, rows, step):
            some = self._piece.read(region((slice(start, start + step),), self._piece.shape))
            total = total + some.double().sum(dim=0)
        mean: Tensor = (total / rows).to(some.dtype)
        return mean


def grow(pieces: dict[str, Piece], module: Any, stored: int) -> None:
    """Gives the embedding and the head of files with `stored` rows those that the module has."""
    ends = [end for end in (module.get_input_embeddings(), module.get_output_embeddings()) if end is not None]
    ours = {id(tensor) for end in ends for tensor in end.parameters()}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in ours and name in pieces and pieces[name].shape[0] == stored < tensor.shape[0]:
            pieces[name] = Grown(pieces[name], tensor.shape[0])
