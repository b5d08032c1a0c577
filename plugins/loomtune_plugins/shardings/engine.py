"""What the torch-native engines have in common; a layout says how they differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loomtune.contracts import Batch, Engine, EngineSpec, ParameterShard, Reader, StateKind
from loomtune.contracts.sharding import StateReader
from loomtune.toolkit.dropout import SeededDropout, dropout_keys, recompute_keys
from loomtune.toolkit.network import Network, saved_name
from loomtune.world import World
from loomtune_plugins.shardings.groups import parameter_groups
from loomtune_plugins.shardings.norms import scale_down, total_norm

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


class TorchEngine(Engine):
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
        self.spec, self.world, self.layout = spec, world, layout
        self.network = Network(spec, sequence=sequence)
        if recompute:
            _recompute(spec.model.blocks(self.network.base))
        self._set_dtypes()
        layout.shard(self.network)
        self._materialise()
        self.named = dict(self.network.named_parameters())
        self.trainable = {name: p for name, p in self.named.items() if p.requires_grad}
        self.optimizer, self.scales = self._optimizer()
        self.wrapped = layout.wrap(self.network)
        self.network.train()

    def _set_dtypes(self) -> None:
        """Trained weights in fp32; frozen ones in the type of computation, which is all that they are used in."""
        for parameter in self.network.parameters():
            kept = torch.float32 if parameter.requires_grad else self.network.compute_dtype
            if parameter.is_floating_point():  # packed, quantised weights are no numbers
                parameter.data = parameter.data.to(kept)

    @torch.no_grad()
    def _materialise(self) -> None:
        """Gives storage and values to every tensor, one at a time."""
        with _swapping():  # keeps tied parameters one object, which `to_empty` alone would part
            self.network.to_empty(device=self.layout.home(self.world.device))
        for name, parameter in self.network.named_parameters():
            local = self.layout.local(parameter)
            local.copy_(self.network.initial(name, self.layout.region(parameter)))
        saved = self.network.state_dict().keys()
        for name, buffer in self.network.named_buffers():
            if name in saved:
                buffer.copy_(self.network.initial(name, None))
        self.spec.model.restore_buffers(self.network.base)

    def _optimizer(self) -> tuple[torch.optim.Optimizer | None, list[float]]:
        if self.spec.optimizer is None:
            return None, []
        groups = parameter_groups(self.trainable, self.spec.adapter)
        return self.spec.optimizer.build(groups), [group.learning_rate_scale for group in groups]

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

    @torch.no_grad()
    def step(self, rate: float, clip: float, proceed: Callable[[float], bool]) -> float:
        assert self.optimizer is not None, "a frozen role takes no steps"
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        norm = total_norm(gradients)
        if proceed(float(norm)):
            if clip > 0:
                scale_down(gradients, clip, norm)
            for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
                group["lr"] = rate * scale
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        active = [m for m in self.network.modules() if isinstance(m, SeededDropout | nn.Dropout) and m.training]
        for module in active:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in active:
                module.training = True
            self.layout.settle()

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        with self.evaluating(), self.network.plain() as base:
            yield base if self.layout.whole else self._twin()

    def _twin(self) -> nn.Module:
        """A plain network with the weights of this one, whole on every rank for as long as it is used."""
        twin = Network(self.spec)
        twin.requires_grad_(False)
        with _swapping():
            twin.to_empty(device=self.world.device)
        tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
        for name, tensor in self._stream():
            tensors[name].copy_(tensor)
        self.spec.model.restore_buffers(twin.base)
        return twin.eval().base

    @torch.no_grad()
    def _stream(self, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        saved = self.network.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.network.named_buffers() if name in saved}
        for name, tensor in (self.named | buffers).items():
            if wanted is None or wanted(saved_name(name)):
                yield name, self.layout.full(tensor.detach())

    def stream_weights(self, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._stream(wanted):
            yield saved_name(name), tensor.float()

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

    @torch.no_grad()
    def load(self, read: StateReader, *, optimizer: bool) -> None:
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

    def trained(self) -> Mapping[str, tuple[int, ...]]:
        return {saved_name(name): tuple(parameter.shape) for name, parameter in self.trainable.items()}

    def state_bytes(self) -> int:
        kinds = self.spec.optimizer.state().values() if self.spec.optimizer else ()
        like = sum(kind is StateKind.LIKE for kind in kinds)
        return like * sum(self.layout.local(p.detach()).nbytes for p in self.trainable.values())

    def close(self) -> None:
        self.optimizer = None
        self.named, self.trainable = {}, {}
        del self.wrapped, self.network, self.layout


def _recompute(blocks: list[nn.Module]) -> None:
    """Activation checkpointing inside each block's call, where parameters are gathered; wrappers would rename them."""
    for block in blocks:
        forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=recompute_keys)
        block.forward = forward


@contextmanager
def _swapping() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
