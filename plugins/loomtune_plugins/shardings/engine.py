"""What the torch-native engines have in common; a layout says how they differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loomtune.contracts import Batch, EngineSpec, ParameterShard, Reader, StateKind
from loomtune.contracts.sharding import StateReader
from loomtune.toolkit.dropout import dropout_keys
from loomtune.toolkit.network import Network, saved_name
from loomtune.world import World
from loomtune_plugins.shardings.network_engine import NetworkEngine, set_types, swapping

Region = tuple[slice, ...]


class Layout(ABC):
    """Where the parts of each parameter lie, and what wraps the network."""

    autocasts: bool = True
    """True where mixed precision is torch's autocast; a layout that casts gathered parameters itself says False."""

    @abstractmethod
    def shard(self, network: Network) -> None:
        """Lays the network out, still without storage."""

    @abstractmethod
    def wrap(self, network: Network) -> nn.Module:
        """The module that is called, once the weights are there."""

    @abstractmethod
    def region(self, parameter: nn.Parameter) -> Region:
        """The part of a parameter that this rank holds."""

    @abstractmethod
    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part, as a plain tensor that shares its storage."""

    @abstractmethod
    def full(self, tensor: Tensor) -> Tensor:
        """The whole, on every rank."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """See `Engine.accumulating`."""

    def settle(self) -> None:
        """Frees what a forward pass without a backward pass, or before new weights, left gathered."""
        return

    def agree(self, gradients: Iterable[Tensor]) -> None:
        """Makes equal to the bit what several ranks hold of the reduced gradients. Collective."""
        return

    def home(self, device: torch.device) -> torch.device:
        """Where parameters live between uses."""
        return device

    @abstractmethod
    def answers_for(self, parameter: nn.Parameter, index: int, sizes: list[int]) -> bool:
        """True where this rank writes its part of the index-th trained parameter. sizes: bytes of all of them."""

    @property
    @abstractmethod
    def whole(self) -> bool:
        """True where every rank holds every parameter whole."""


class TorchEngine(NetworkEngine):
    """Birth on the meta device, weights read region by region, torch's optimizer, exact sums."""

    def __init__(
        self,
        spec: EngineSpec,
        world: World,
        layout: Layout,
        *,
        recompute: bool = False,
        sequence: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(spec, world, recompute=recompute, sequence=sequence)
        self.layout = layout
        set_types(self.network)
        layout.shard(self.network)
        self._materialise()
        self._name_parameters()
        if spec.optimizer is not None:
            self.optimizer = spec.optimizer.build(self.groups)
        self.wrapped = layout.wrap(self.network)
        self.network.train()

    @torch.no_grad()
    def _materialise(self) -> None:
        """Gives storage and values to every tensor, one at a time."""
        with swapping():
            self.network.to_empty(device=self.layout.home(self.world.device))
        for name, parameter in self.network.named_parameters():
            local = self.layout.local(parameter)
            local.copy_(self.network.initial(name, self.layout.region(parameter)))
        self._read_buffers()

    def forward(self, batch: Batch, reader: Reader, *, adapter: bool = True) -> Any:
        device = self.world.device.type
        autocasts = self.layout.autocasts and self.spec.precision == "bf16"
        cast = torch.autocast(device, torch.bfloat16) if autocasts else nullcontext()
        with dropout_keys(batch), cast:
            return self.wrapped(batch, reader, adapter)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        return self.layout.accumulating(last)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _gradients(self) -> list[Tensor]:
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        self.layout.agree(gradients)
        return gradients

    def _update(self) -> None:
        assert self.optimizer is not None
        self.optimizer.step()

    def _forget(self) -> None:
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)

    def _settle(self) -> None:
        self.layout.settle()

    @property
    def _everything(self) -> bool:
        return self.layout.whole

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        return self.layout.full(parameter.detach())

    def shards(self) -> Iterator[ParameterShard]:
        sizes = [parameter.numel() for parameter in self.trainable.values()]
        for index, (name, parameter) in enumerate(self.trainable.items()):
            region = self.layout.region(parameter)
            if not self.layout.answers_for(parameter, index, sizes) or any(part.start >= part.stop for part in region):
                continue
            tensors = {"weight": self.layout.local(parameter.detach()), **self._state_of(parameter)}
            offset = tuple(part.start for part in region)
            yield ParameterShard(saved_name(name), tuple(parameter.shape), offset, tensors)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        assert self.optimizer is not None and self.spec.optimizer is not None
        state = self.optimizer.state.get(parameter, {})
        names = [name for name in self.spec.optimizer.state() if name in state]
        return {name: self.layout.local(torch.as_tensor(state[name])) for name in names}

    def _weights(self) -> Iterator[tuple[str, Region, Tensor]]:
        for name, parameter in self.trainable.items():
            yield saved_name(name), self.layout.region(parameter), self.layout.local(parameter)

    @torch.no_grad()
    def load(self, read: StateReader, *, optimizer: bool) -> None:
        self.updates += 1
        for name, parameter in self.trainable.items():
            region = self.layout.region(parameter)
            self.layout.local(parameter).copy_(read(saved_name(name), "weight", region))
            if optimizer and self.optimizer is not None:
                self.optimizer.state[parameter] = self._read_state(read, saved_name(name), parameter, region)
        self.layout.settle()

    def _read_state(self, read: StateReader, name: str, parameter: nn.Parameter, region: Region) -> dict[str, Any]:
        assert self.spec.optimizer is not None
        state: dict[str, Any] = {}
        for key, kind in self.spec.optimizer.state().items():
            try:
                values = read(name, key, None if kind is StateKind.SCALAR else region)
            except KeyError:  # not there before the first step that needs it, as momentum is
                continue
            if kind is StateKind.LIKE:
                state[key] = torch.zeros_like(parameter)
                self.layout.local(state[key]).copy_(values)
            else:
                state[key] = values.to(self._home(parameter) if kind is StateKind.SCALAR else parameter.device)
        return state

    def _home(self, parameter: nn.Parameter) -> torch.device:
        """Where torch keeps the count of steps: with the parameter for kernels that read it there, else on the CPU."""
        assert self.optimizer is not None
        group = next(group for group in self.optimizer.param_groups if any(p is parameter for p in group["params"]))
        return parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")

    def _held_bytes(self) -> int:
        near = self.layout.home(self.world.device) == self.world.device
        return sum(self.layout.local(p.detach()).nbytes for p in self.trainable.values()) if near else 0

    def close(self) -> None:
        super().close()
        del self.wrapped, self.layout
