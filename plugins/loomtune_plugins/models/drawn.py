"""Weights that are drawn from the seed, each tensor by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loomtune.contracts import WeightSource
from loomtune.contracts.sharding import Region
from loomtune.errors import UserError
from loomtune.world import derive
from loomtune_plugins.models.pieces import region

if TYPE_CHECKING:
    from torch import Tensor

DONE = "_is_hf_initialized"
"""transformers' mark on a tensor that its initialisation leaves alone."""


class DrawnWeights(WeightSource):
    """Each tensor is a pure function of (seed, its name), drawn as the model's own initialisation would draw it.

    module: a skeleton on the meta device that nobody else uses: tensors take their places in it one at a time. Nothing
    is kept, so a slice costs the drawing of its tensor, and the memory of one.
    """

    def __init__(self, module: Any, seed: int) -> None:
        self._module, self._seed = module, seed
        self._aliases: Mapping[str, str] = module.all_tied_weights_keys
        tensors = module.state_dict(keep_vars=True)
        self._shapes = {name: tuple(t.shape) for name, t in tensors.items() if name not in self._aliases}
        for tensor in tensors.values():
            setattr(tensor, DONE, True)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor once: of tied names, the one that the others are tied to."""
        return self._shapes

    def read(self, name: str, where: Region | None = None) -> Tensor:
        """The tensor, or the slice of it, on the CPU in fp32; a tied name reads what it is tied to."""
        name = self._aliases.get(name, name)
        whole = self._draw(name)
        return whole[region(where, whole.shape)].contiguous() if where is not None else whole

    def _draw(self, name: str) -> Tensor:
        from transformers.initialization import guard_torch_init_functions

        path, _, leaf = name.rpartition(".")
        with self._placed(self._module.get_submodule(path), leaf) as tensor, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(self._seed, "weights", name))
            # From the leaf to the root, as transformers does: a block may redraw what lies in it (GPT-2's residuals).
            with torch.no_grad(), torch.device("cpu"), guard_torch_init_functions():
                for owner, module in _ancestors(self._module, path):
                    owner._init_weights(module)
            if tensor.is_floating_point() and bool(tensor.sum().isnan()):  # a sum takes no memory, a mask a quarter
                raise UserError.of(
                    f"{type(self._module).__name__} does not say how '{name}' is drawn",
                    "set model=huggingface and model.path to trained weights",
                )
            return tensor.detach()

    @contextmanager
    def _placed(self, parent: nn.Module, leaf: str) -> Iterator[Tensor]:
        """An unset tensor in the place of one on the meta device."""
        places: dict[str, Any] = parent._parameters if leaf in parent._parameters else parent._buffers
        ghost = places[leaf]
        filling = torch.nan if ghost.is_floating_point() else 0
        tensor = torch.full(ghost.shape, filling, dtype=ghost.dtype, device="cpu")
        places[leaf] = nn.Parameter(tensor, requires_grad=False) if leaf in parent._parameters else tensor
        try:
            yield places[leaf]
        finally:
            places[leaf] = ghost


def _ancestors(root: Any, path: str) -> list[tuple[Any, nn.Module]]:
    """From the module at a path up to the root, each with the model whose initialisation applies to it."""
    names = path.split(".") if path else []
    chain, owner, module = [(root, root)], root, root
    for name in names:
        module = getattr(module, name)
        owner = module if hasattr(module, "_init_weights") else owner
        chain.append((owner, module))
    return chain[::-1]
