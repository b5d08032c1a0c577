"""The tensors of LoRA: first values, scale, and merging into the base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from loomtune.contracts import WeightSource
from loomtune.world import derive
from loomtune_plugins.adapters.lora_names import PREFIX, Added, added, base_name, woven_name
from loomtune_plugins.adapters.settings import LoraSettings


class WovenWeights(WeightSource):
    """The base's tensors under their names in the woven module, and first values of what was added."""

    def __init__(self, base: WeightSource, layers: Mapping[str, tuple[int, int]], rank: int, dora: bool, seed: int):
        """layers: name to (input width, output width) of the wrapped ones."""
        self._base, self._seed = base, seed
        self._shapes = {woven_name(name, layers): shape for name, shape in base.shapes().items()}
        for layer, (inputs, outputs) in layers.items():
            self._shapes[f"{PREFIX}{layer}.lora_A.default.weight"] = (rank, inputs)
            self._shapes[f"{PREFIX}{layer}.lora_B.default.weight"] = (outputs, rank)
            if dora:
                self._shapes[f"{PREFIX}{layer}.lora_magnitude_vector.default.weight"] = (outputs,)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes as in the woven module."""
        return self._shapes

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor or the slice of it; what was added in fp32."""
        part = added(name)
        if part is None:
            return self._base.read(base_name(name), where)
        shape = self._shapes[name]
        if part.part == "lora_magnitude_vector":
            return self._row_lengths(part.layer, where)
        if part.part == "lora_B":
            return torch.zeros(shape if where is None else torch.empty(shape, device="meta")[where].shape)
        # Drawn whole and then cut: A is small, and any slice of it is then the same on every world size.
        drawn = draw(shape, derive(self._seed, part.layer, part.part))
        return drawn if where is None else drawn[where].clone()

    def _row_lengths(self, layer: str, where: tuple[slice, ...] | None) -> Tensor:
        """DoRA starts from the length of each row of the base (Liu et al. 2024, equation 5, with B = 0)."""
        rows = None if where is None else (*where, slice(None))
        lengths: Tensor = torch.linalg.vector_norm(self._base.read(f"{layer}.weight", rows).float(), dim=1)
        return lengths


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """First values of A, as in Microsoft's LoRA: those of torch's linear layers (He et al. 2015 with a = sqrt(5))."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def scale(settings: LoraSettings) -> float:
    """Factor of B A: alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023)."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def merged(tensors: Iterator[tuple[str, Tensor]], settings: LoraSettings) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors, a wrapped layer's with its addition. Waits only for what one layer still lacks."""
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")[: 2 + settings.dora]
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        part = _part(name)
        if part is None:
            yield base_name(name), tensor
            continue
        held = waiting.setdefault(part.layer, {})
        held[part.part] = tensor
        if len(held) == len(parts) + 1:
            del waiting[part.layer]
            yield f"{part.layer}.weight", _merge(held.pop("weight"), *(held[key] for key in parts), by=scale(settings))
    assert not waiting, f"parts of the adapter never came: {sorted(waiting)[:3]}"


def _part(name: str) -> Added | None:
    """What a tensor is to the merge of a layer; None where it stays as it is (a bias, a layer that is not wrapped)."""
    if name.endswith(".base_layer.weight"):
        return Added(base_name(name).removesuffix(".weight"), "weight")
    return added(name)


def _merge(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None = None, *, by: float) -> Tensor:
    """W + scale B A in fp32, given back in the type of W; for DoRA with its rows brought to the learned lengths."""
    where = weight.device
    whole = weight.float() + by * (b.to(where).float() @ a.to(where).float())
    if magnitude is not None:
        lengths = torch.linalg.vector_norm(whole, dim=1, keepdim=True)
        whole = magnitude.to(where).float().unsqueeze(1) / lengths * whole
    return whole.to(weight.dtype)
