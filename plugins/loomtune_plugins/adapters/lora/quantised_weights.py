"""The base's weights as quantised layers want them, made as they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loomtune.contracts import WeightSource
from loomtune.contracts.sharding import Region
from loomtune_plugins.adapters.lora.quantised import Packing, bytes_of


class QuantisedWeights(WeightSource):
    """Packs rows when they are asked for, so that no more of a matrix is read than is packed.

    The scales of double quantisation hang on all scales of their layer. For these the matrix is read whole, and what
    was made of it (a byte for each block) is kept until another layer is asked for.
    """

    def __init__(self, base: WeightSource, layers: Mapping[str, Packing]) -> None:
        self._base, self._layers = base, layers
        self._known: tuple[str, dict[str, Tensor]] = ("", {})

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's, and those of the bytes; the matrices too, which no tensor of a packed layer is."""
        of_layers = {
            f"{layer}.{leaf}": shape for layer, how in self._layers.items() for leaf, shape in how.shapes.items()
        }
        return {**self._base.shapes(), **of_layers}

    def read(self, name: str, where: Region | None = None) -> Tensor:
        """Bytes of a layer, or a slice of them. `weight` of a layer: the matrix that is computed with, fp32."""
        layer, _, leaf = name.rpartition(".")
        how = self._layers.get(layer)
        if how is None or leaf not in (*how.shapes, "weight"):
            return self._base.read(name, where)
        rows, rest = (slice(None), ()) if where is None else (where[0], where[1:])
        if leaf == "packed":
            return how.pack(self._rows(layer, rows))[:, *rest]
        if leaf == "scales" and not how.double:
            return bytes_of(how.scales(self._rows(layer, rows)))[:, *rest]
        if leaf == "weight":
            held = {part: self.read(f"{layer}.{part}") for part in how.shapes}
            return how.unpack(held["packed"], held["scales"], held.get("nested"), torch.float32)[rows, *rest]
        return self._nested(layer, how)[leaf][rows, *rest].clone()

    def _rows(self, layer: str, rows: slice) -> Tensor:
        return self._base.read(f"{layer}.weight", (rows, slice(0, self._layers[layer].columns)))

    def _nested(self, layer: str, how: Packing) -> dict[str, Tensor]:
        if self._known[0] != layer:
            scales, nested = how.nested(how.scales(self._base.read(f"{layer}.weight")))
            self._known = layer, {"scales": scales, "nested": nested}
        return self._known[1]
