"""The engine of ZeRO: DeepSpeed's partitions behind the contract that every engine keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loomtune.contracts import Batch, EngineSpec, ParameterShard, Reader, StateKind
from loomtune.contracts.sharding import Region, StateReader
from loomtune.errors import UserError
from loomtune.toolkit.dropout import dropout_keys
from loomtune.toolkit.network import saved_name
from loomtune.world import World
from loomtune_plugins.shardings import deepspeed_engine
from loomtune_plugins.shardings import deepspeed_state as state
from loomtune_plugins.shardings.flat import Fragment
from loomtune_plugins.shardings.linear import unhold
from loomtune_plugins.shardings.network_engine import NetworkEngine
from loomtune_plugins.shardings.norms import total_norm
from loomtune_plugins.shardings.settings import ZeroSettings
from loomtune_plugins.shardings.zero_config import Configuration, configuration

Fragments = list[tuple[str, Fragment]]


class ZeroEngine(NetworkEngine):
    """Birth a parameter at a time, torch's optimizer on flat masters, exact sums.

    Stages 1 and 2 of a frozen network have nothing to partition: it then computes without DeepSpeed.
    device_type: that DeepSpeed is configured for; empty: the world's own.
    """

    device_type = ""

    def __init__(
        self, spec: EngineSpec, world: World, settings: ZeroSettings, sequence: dist.ProcessGroup | None = None
    ) -> None:
        deepspeed_engine.join(world, disk=bool(settings.nvme))
        super().__init__(spec, world, recompute=settings.activation_checkpointing, sequence=sequence)
        self.settings = settings
        if settings.stage == 3:
            unhold(self.network.module)
        self._name_parameters()  # after birth DeepSpeed's parameters have one dimension, and none would decay
        config = configuration(settings, spec.precision, self.device_type or world.device.type)
        self._materialise(config)
        self.partitions: state.Partitions | None = None
        self.deepspeed = self._start(config)
        self._call_last(True)
        self.network.train()

    @torch.no_grad()
    def _materialise(self, config: Configuration) -> None:
        """Gives storage and values to every tensor, one at a time; parameters in the type of computation."""
        network, device = self.network, self.world.device
        birth = deepspeed_engine.Birth(config, self.world) if self.settings.stage == 3 else partial(_born_whole, device)
        for name, parameter in network.named_parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(network.compute_dtype)
            birth(parameter, partial(network.initial, name))
        _realise_buffers(network, device)
        self._read_buffers()

    def _start(self, config: Configuration) -> Any:
        """DeepSpeed's engine, where there is something to partition."""
        if self.spec.optimizer is not None:
            self.optimizer = self.spec.optimizer.build(self.groups)
        elif self.settings.stage < 3:
            return None
        engine = deepspeed_engine.start(self.network, self.optimizer, config, self.world)
        if self.optimizer is not None:
            kind = state.Stage3 if self.settings.stage == 3 else state.Stages12
            self.partitions = kind(engine, self.world)
            if self.network.compute_dtype != torch.float32:
                self._read_masters(self.network.initial)
        return engine

    def forward(self, batch: Batch, reader: Reader, *, adapter: bool = True) -> Any:
        with dropout_keys(batch):
            return self.network(batch, reader, adapter)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._call_last(last)
        try:
            yield
        finally:
            self._call_last(True)

    def _call_last(self, last: bool) -> None:
        """Says whether the gradients of this step are all there after the next backward pass."""
        if self.partitions is not None:
            self.deepspeed.set_gradient_accumulation_boundary(last and not self.partitions.late)

    def backward(self, loss: Tensor) -> None:
        deepspeed_engine.backward(self.deepspeed, loss, self.world)

    def _gradients(self) -> list[Tensor]:
        assert self.partitions is not None
        return self.partitions.gradients()

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm `()` fp32 of all ranks' gradients; each rank has a part of its own."""
        squares = total_norm(gradients).double().square().to(self.world.device)
        dist.all_reduce(squares)
        return squares.sqrt().float()

    def _update(self) -> None:
        assert self.partitions is not None
        self.partitions.deliver()
        self.deepspeed.set_gradient_accumulation_boundary(True)
        self.deepspeed.step()

    def _forget(self) -> None:
        assert self.partitions is not None
        self.partitions.forget()
        self._call_last(True)

    def _settle(self) -> None:
        if self.deepspeed is not None:
            deepspeed_engine.settle(self.deepspeed)

    @property
    def _everything(self) -> bool:
        masters = self.partitions is not None and self.network.compute_dtype != torch.float32
        return self.settings.stage < 3 and not masters

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """The master of a trained parameter, a frozen one in the type of computation."""
        if parameter.requires_grad and self.partitions is not None:
            return self.partitions.whole(parameter)
        with deepspeed_engine.gathered(parameter, self.world) as tensor:
            return tensor  # keeps its storage, which the parameter lets go here

    def shards(self) -> Iterator[ParameterShard]:
        for group, fragments in self._fragments():
            assert self.partitions is not None and self.spec.optimizer is not None
            flat, kept = self.partitions.flats[group].detach(), self.partitions.state(group)
            declared = {key: torch.as_tensor(kept[key]) for key in self.spec.optimizer.state() if key in kept}
            scalars = {key: value for key, value in declared.items() if value.shape != flat.shape}
            likes = {"weight": flat} | {key: value for key, value in declared.items() if key not in scalars}
            for name, fragment in fragments:
                for cuts in zip(*(fragment.cut(tensor) for tensor in likes.values()), strict=True):
                    tensors = dict(zip(likes, (values for _, values in cuts), strict=True)) | scalars
                    yield ParameterShard(saved_name(name), fragment.shape, cuts[0][0].offset, tensors)

    def _fragments(self) -> Iterator[tuple[int, Fragments]]:
        """What this rank holds of each group, by the parameters' names in the network; it is in memory meanwhile."""
        if self.partitions is None:
            return
        names = {parameter: name for name, parameter in self.trainable.items()}
        held = [fragment for fragment in self.partitions.fragments() if fragment.begin < fragment.end]
        for group in range(len(self.partitions.groups)):
            with self.partitions.resident(group):
                yield group, [(names[part.parameter], part) for part in held if part.group == group]

    def _weights(self) -> Iterator[tuple[str, Region, Tensor]]:
        for group, fragments in self._fragments():
            assert self.partitions is not None
            for name, fragment in fragments:
                for box, values in fragment.cut(self.partitions.flats[group]):
                    yield saved_name(name), box.region, values

    @torch.no_grad()
    def load(self, read: StateReader, *, optimizer: bool) -> None:
        if self.partitions is None:
            return
        self.updates += 1
        self._read_masters(lambda name, region: read(saved_name(name), "weight", region))
        self.partitions.publish()
        if optimizer:
            for group, fragments in self._fragments():
                self._read_state(read, group, fragments)

    @torch.no_grad()
    def _read_masters(self, read: Callable[[str, tuple[slice, ...]], Tensor]) -> None:
        for group, fragments in self._fragments():
            assert self.partitions is not None
            for name, fragment in fragments:
                for box, values in fragment.cut(self.partitions.flats[group]):
                    values.copy_(read(name, box.region))

    def _read_state(self, read: StateReader, group: int, fragments: Fragments) -> None:
        """Makes the state of a flat tensor, which a fresh engine has none of."""
        assert self.partitions is not None and self.spec.optimizer is not None
        kept, kinds = self.partitions.state(group), self.spec.optimizer.state()
        kept.clear()
        for key, kind in kinds.items():
            like = kind is StateKind.LIKE
            found = self._read_like(read, group, fragments, key) if like else self._read_scalar(read, group, key)
            if found is not None:
                kept[key] = found
        if any(kind is StateKind.SCALAR and key not in kept for key, kind in kinds.items()):
            kept.clear()  # before the first step there is none of it

    def _read_like(self, read: StateReader, group: int, fragments: Fragments, key: str) -> Tensor | None:
        """None where nothing is stored, as momentum is not before the first step that needs it."""
        assert self.partitions is not None
        tensor = torch.zeros_like(self.partitions.flats[group])
        found = not fragments  # a rank that holds nothing but padding goes along
        for name, fragment in fragments:
            for box, values in fragment.cut(tensor):
                try:
                    values.copy_(read(saved_name(name), key, box.region))
                    found = True
                except KeyError:
                    continue
        return tensor if found else None

    def _read_scalar(self, read: StateReader, group: int, key: str) -> Tensor | None:
        assert self.partitions is not None
        members = set(self.partitions.groups[group])
        names = [saved_name(name) for name, parameter in self.trainable.items() if parameter in members]
        values = {}
        for name in names:
            try:
                values[name] = read(name, key, None)
            except KeyError:
                continue
        if not values:
            return None
        if len({float(value) for value in values.values()}) > 1 or len(values) < len(names):
            raise UserError.of(
                f"the {key} of the optimizer differs from parameter to parameter, and ZeRO keeps one for many",
                "resume with the sharding that wrote the checkpoint",
            )
        near = self.partitions.counts_nearby(group)
        return next(iter(values.values())).to(self.partitions.flats[group].device if near else "cpu")

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return state.shape(parameter)

    def _held_bytes(self) -> int:
        if self.partitions is None:
            return 0
        near = [flat.device == self.world.device for flat in self.partitions.flats]
        return 4 * sum(part.end - part.begin for part in self.partitions.fragments() if near[part.group])

    def close(self) -> None:
        if self.deepspeed is not None:
            deepspeed_engine.destroy(self.deepspeed)
        self.deepspeed = self.partitions = None
        super().close()


def _born_whole(device: torch.device, parameter: nn.Parameter, read: deepspeed_engine.Read) -> None:
    """Storage and values for a parameter, which stays the same object: it may be tied."""
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    whole.copy_(read(tuple(slice(0, size) for size in parameter.shape)))
    born = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, born)  # type: ignore[no-untyped-call]


def _realise_buffers(network: nn.Module, device: torch.device) -> None:
    """Storage for buffers. `to_empty` would give parameters another one as well."""
    real: dict[Tensor, Tensor] = {}
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            real.setdefault(buffer, torch.empty_like(buffer, device=device))
            module._buffers[name] = real[buffer]
