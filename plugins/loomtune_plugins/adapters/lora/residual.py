"""A base from whose matrices the first values of an adapter are taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from loomtune.contracts import WeightSource
from loomtune.contracts.sharding import Region


class Residual(WeightSource):
    """`W - scale B0 A0` in the place of W, given in fp32, in which it adds up to W with the first values.

    Where `precision` keeps frozen weights in bf16, the difference is rounded there: the network begins that far from
    the base, while what it learns is saved for the true one.

    taken: what is taken out of a layer's matrix, whole, in the matrix' own layout. It is made anew for each read and
    then cut, so that slices are those of the whole to the bit.
    """

    def __init__(self, base: WeightSource, layers: Iterable[str], taken: Callable[[str], Tensor]) -> None:
        self._base, self._taken = base, taken
        self._names = {f"{layer}.weight": layer for layer in layers}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Those of the base."""
        return self._base.shapes()

    def read(self, name: str, where: Region | None = None) -> Tensor:
        """The base's own, or in fp32 what is left of it."""
        found = self._base.read(name, where)
        if name not in self._names:
            return found
        taken = self._taken(self._names[name])
        return found.float() - (taken if where is None else taken[where])
