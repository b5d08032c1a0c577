"""What every engine does alike with its network, wherever the parts of the parameters lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loomtune.contracts import Engine, EngineSpec, ParameterGroup, StateKind
from loomtune.contracts.sharding import Region, StateReader
from loomtune.toolkit.dropout import SeededDropout, recompute_keys
from loomtune.toolkit.network import Network, saved_name
from loomtune.world import World
from loomtune_plugins.shardings.groups import parameter_groups
from loomtune_plugins.shardings.linear import quicken
from loomtune_plugins.shardings.norms import scale_down, total_norm
from loomtune_plugins.shardings.stretches import Stretched


class NetworkEngine(Engine):
    """Measuring, gathering, streaming and stepping; how parameters are born, kept and loaded is left to say.

    named: the network's parameters by their names in it. trainable: the trained ones. groups: these, as the optimizer
    takes them. optimizer: torch's, of the parameters or of flat tensors that they lie in.
    """

    def __init__(
        self, spec: EngineSpec, world: World, *, recompute: bool = False, sequence: dist.ProcessGroup | None = None
    ) -> None:
        self.spec, self.world = spec, world
        self.network = Network(spec) if sequence is None else Stretched(spec, sequence)
        quicken(self.network.module)
        if recompute:
            _recompute(spec.model.blocks(self.network.base))
        self.named: dict[str, nn.Parameter] = {}
        self.trainable: dict[str, nn.Parameter] = {}
        self.groups: list[ParameterGroup] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def _name_parameters(self) -> None:
        """To be called when parameters are the objects, with the dimensions, that the optimizer is to know."""
        self.named = dict(self.network.named_parameters())
        self.trainable = {name: p for name, p in self.named.items() if p.requires_grad}
        self.groups = parameter_groups(self.trainable, self.spec.adapter)

    def _read_buffers(self) -> None:
        """Values of buffers that have storage: those that are saved are read, the others computed."""
        saved = self.network.state_dict().keys()
        for name, buffer in self.network.named_buffers():
            if name in saved:
                buffer.copy_(self.network.initial(name, None))
        self.spec.model.restore_buffers(self.network.base)

    @torch.no_grad()
    def step(self, rate: float, clip: float, proceed: Callable[[float], bool]) -> float:
        assert self.optimizer is not None, "a frozen role takes no steps"
        gradients = self._gradients()
        norm = self._norm(gradients)
        if proceed(float(norm)):
            if clip > 0:
                scale_down(gradients, clip, norm)
            for options, group in zip(self.optimizer.param_groups, self.groups, strict=True):
                options["lr"] = rate * group.learning_rate_scale
            self._update()
            self.updates += 1
        self._forget()
        return float(norm)

    @abstractmethod
    def _gradients(self) -> list[Tensor]:
        """This rank's gradients of the step, reduced; what is done to them reaches the optimizer. Collective."""

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm `()` fp32 of all ranks' gradients."""
        return total_norm(gradients)

    @abstractmethod
    def _update(self) -> None:
        """Takes the optimizer's step. A norm that is not finite is no reason to leave it out: guards say so, or not."""

    @abstractmethod
    def _forget(self) -> None:
        """Drops the gradients."""

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
            self._settle()

    @contextmanager
    def wearing(self, read: StateReader) -> Iterator[None]:
        kept = {_place(name, region): values.detach().clone() for name, region, values in self._weights()}

        def other(name: str, tensor: str, region: Region | None) -> Tensor:
            try:
                return read(name, tensor, region)
            except KeyError:
                return kept[_place(name, region)]

        try:
            self.load(other, optimizer=False)
            yield
        finally:
            self.load(lambda name, tensor, region: kept[_place(name, region)], optimizer=False)

    @abstractmethod
    def _weights(self) -> Iterator[tuple[str, Region, Tensor]]:
        """What this rank holds of the trained parameters in fp32, by the regions in which `load` asks for it."""

    @abstractmethod
    def _settle(self) -> None:
        """Frees what a forward pass without a backward pass left gathered."""

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        whole = self.network.plain() if self._everything else self._filled()
        with self.evaluating(), whole as module, computing(self.network, self.world.device):
            yield module

    @property
    @abstractmethod
    def _everything(self) -> bool:
        """True where every rank holds every parameter whole, in the type that `set_types` says."""

    @contextmanager
    def _filled(self) -> Iterator[nn.Module]:
        """A plain network with the weights of this one, whole on every rank within the context and nowhere after it."""
        twin = self._twin
        try:
            with swapping():
                twin.to_empty(device=self.world.device)
            self._fill(twin)
            self.spec.model.restore_buffers(twin.base)
            yield twin.base
        finally:
            with swapping():
                twin.to("meta")

    def _fill(self, twin: Network) -> None:
        """By itself, so that the last whole tensor, often a head, does not live on beside its copy."""
        tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
        for name, tensor in self._stream():
            tensors[name].copy_(tensor)

    @cached_property
    def _twin(self) -> Network:
        """A plain network without storage: building it, of thousands of modules, takes longer than a short rollout."""
        twin = Network(self.spec)
        quicken(twin.module)
        set_types(twin)
        lighten(twin)
        return twin.eval()

    @torch.no_grad()
    def _stream(self, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        saved = self.network.state_dict().keys()
        for name, parameter in self.named.items():
            if wanted is None or wanted(saved_name(name)):
                yield name, self._whole(parameter)
        for name, buffer in self.network.named_buffers():
            if name in saved and (wanted is None or wanted(saved_name(name))):
                yield name, buffer

    @abstractmethod
    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter on every rank: fp32 if it is trained, else in the type that it is kept in. Collective."""

    def stream_weights(self, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._stream(wanted):
            yield saved_name(name), tensor.float()

    def trained(self) -> Mapping[str, tuple[int, ...]]:
        return {saved_name(name): self._shape(parameter) for name, parameter in self.trainable.items()}

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(parameter.shape)

    def state_bytes(self) -> int:
        kinds = self.spec.optimizer.state().values() if self.spec.optimizer else ()
        return self._held_bytes() * sum(kind is StateKind.LIKE for kind in kinds)

    @abstractmethod
    def _held_bytes(self) -> int:
        """Bytes, in fp32, of the trained parameters whose optimizer state this rank keeps on its device."""

    def close(self) -> None:
        self.optimizer = None
        self.named, self.trainable, self.groups = {}, {}, []
        self.__dict__.pop("_twin", None)
        del self.network


def set_types(network: Network) -> None:
    """Trained weights in fp32; frozen ones in the type of computation, which is all that they are used in.

    What is generated from has them so too, under every strategy: completions must not hang on where weights lie.
    """
    for parameter in network.parameters():
        kept = torch.float32 if parameter.requires_grad else network.compute_dtype
        if parameter.is_floating_point():  # packed, quantised weights are no numbers
            parameter.data = parameter.data.to(kept)


def computing(network: Network, device: torch.device) -> AbstractContextManager[Any]:
    """Within it plain calls of the network compute in the type that training computes in."""
    lower = network.compute_dtype
    return nullcontext() if lower == torch.float32 else torch.autocast(device.type, lower)


def lighten(network: Network) -> None:
    """Gives the base's trained linear layers the type that `computing` would make of them anew at each token.

    Others stay, also a tied head: autocast casts what is to be trained once, and keeps it until its end.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for part in network.base.modules():
        for parameter in part.parameters(recurse=False) if type(part) is nn.Linear else ():
            (name, *more) = names[id(parameter)]
            if not more and network.spec.adapter.base_name(saved_name(name)) is not None:
                parameter.data = parameter.data.to(network.compute_dtype)


def _place(name: str, region: Region | None) -> tuple[str, tuple[int, ...]]:
    """A part of a parameter as a key: a rank's parts of one begin in different places."""
    return name, tuple(part.start for part in region or ())


def _recompute(blocks: list[nn.Module]) -> None:
    """Activation checkpointing inside each block's call, where parameters are gathered; wrappers would rename them."""
    for block in blocks:
        forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=recompute_keys)
        block.forward = forward


@contextmanager
def swapping() -> Iterator[None]:
    """Within it conversions keep parameters the same objects; tied ones would be parted otherwise."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
