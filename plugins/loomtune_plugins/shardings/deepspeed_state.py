"""What loomtune knows of DeepSpeed's insides. The one file to read again when DeepSpeed changes.

| DeepSpeed | tried with | what was found |
|---|---|---|
| 0.19.8 | torch 2.13, CPU (gloo) | everything below |

A trained parameter lies flattened in a group, beside the others with its decay and rate. Each rank holds a part of each
group in fp32 (the *masters*), and torch's optimizer knows these flat tensors only. In stages 1 and 2 the group as a
whole is cut into equal parts, in stage 3 each parameter is. What DeepSpeed does that is not seen from outside:

- A fresh engine has no optimizer state: it is made for a flat tensor, which is the key that torch looks it up by.
- Masters and the parameters that compute are different tensors: who changes masters must `publish` them.
- Stage 3, and 2 offloaded, copy the first micro-batch's gradients over those of the last step, and add later ones. A
  parameter that is first used in the second would get the last step's gradient as well: hence `forget`.
- Offloaded, stages 2 and 3 give the optimizer only gradients of parameters that the last micro-batch used. So none is
  called the last (`late`), and all that came together is handed over before the step.
- It finds out that a backward pass begins by hooks on what `DeepSpeedEngine.forward` gives, which must be tensors in
  plain containers and of one forward pass only. So networks are called directly, and passes announced in `backward`.
- Joining builds a C++ operator for shared memory, for a minute, and a killed build leaves a lock on which every later
  start hangs. It builds what its own table calls compatible, and nothing that is used here needs any.
- Stage 3 wants modules called equally often, and in the same order, on every rank: heads are not (`Reading`).
- It makes a process group of its own, with a time-out of its own, unless it finds one in `groups._WORLD_GROUP`.
- In bf16 with gradients in fp32, stage 1 would be another optimizer, of another layout: `start` asks for ZeRO's own.
"""

from __future__ import annotations

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loomtune.errors import UserError
from loomtune.toolkit.network import Network
from loomtune.world import World
from loomtune_plugins.shardings.flat import Fragment, boxes
from loomtune_plugins.shardings.zero_config import Configuration

TRIED = "0.19.8"
Read = Callable[[tuple[slice, ...]], Tensor]
"""The values of a region of a parameter."""


def join(world: World, *, disk: bool) -> None:
    """Imports DeepSpeed in silence and lets it use the process group that there is. disk: state is to lie on one."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    deepspeed = _imported(world.device.type)
    deepspeed.utils.groups._WORLD_GROUP = dist.group.WORLD
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    if disk and not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError.of("DeepSpeed cannot build its async_io here", "install libaio's headers (Debian: libaio-dev)")


@cache
def _imported(device: str) -> Any:
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed\..*")
    # It calls torch's collectives by names that torch 2.13 calls old, tens of times in each step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError.of(f"DeepSpeed cannot be imported: {error}", f"pip install deepspeed=={TRIED}") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


class Birth:
    """Makes parameters of stage 3: one is whole on a rank only until the next one comes."""

    def __init__(self, config: Configuration, world: World) -> None:
        # Not entered as a context: that would draw values, send them round, and give buffers the parameters' type.
        self._init = _imported(world.device.type).zero.Init(config_dict_or_path=config)
        self.world = world

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter, read: Read) -> None:
        """Gives a parameter without storage this rank's part of its values. It stays the same object, if tied too."""
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.world.device)
        size = -(-parameter.numel() // self.world.size)
        begin = min(self.world.rank * size, parameter.numel())
        for box in boxes(parameter.shape, begin, min(begin + size, parameter.numel())):
            whole[box.region] = read(box.region).to(whole)
        born = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        torch.utils.swap_tensors(parameter, born)  # type: ignore[no-untyped-call]
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]


def start(network: Network, optimizer: torch.optim.Optimizer | None, config: Configuration, world: World) -> Any:
    """The DeepSpeedEngine of a network whose weights are there; its `optimizer` is the ZeRO optimizer.

    optimizer: None for a frozen network of stage 3.
    """
    deepspeed = _imported(world.device.type)

    class ZeroOnly(deepspeed.DeepSpeedEngine):  # type: ignore[misc, name-defined]
        def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
            return "zero_optimization"

        def _broadcast_model(self) -> None:
            """Every rank has read the same weights."""

    told = {"config": config, "config_class": deepspeed.DeepSpeedConfig(config), "dist_init_required": False}
    engine = ZeroOnly(None, network, optimizer, **told)
    if engine.zero_optimization_stage() == 3:
        _gather_when_read(network, getattr(engine.optimizer, "parameter_offload", engine.optimizer))
    return engine


def _gather_when_read(network: Network, offload: Any) -> None:
    """Heads are whole while a reader runs, instead of being gathered at each call."""
    modules = [module for head in network.read_heads for module in head.modules()]
    for module in modules:
        for parameter in module.parameters(recurse=False):
            _imported(parameter.device.type).zero.register_external_parameter(network.reading, parameter)
    theirs = [id(hooks) for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in theirs:
            handle.remove()


def shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter, also while only a part of it is there."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Partitions(ABC):
    """What this rank holds of the trained parameters of a ZeRO optimizer."""

    GROUPS: str
    FLATS: str
    OFFLOADS: str
    """Attributes of the ZeRO optimizer that `groups`, `flats` and `offloads` are read from."""
    KNOWN: tuple[str, ...]
    """Others that are relied upon."""

    def __init__(self, engine: Any, world: World) -> None:
        self.zero, self.torch, self.world = engine.optimizer, engine.basic_optimizer, world
        known = (self.GROUPS, self.FLATS, self.OFFLOADS, "averaged_gradients", "zero_grad", *self.KNOWN)
        if missing := [name for name in known if not hasattr(self.zero, name)]:
            found = _imported(world.device.type).__version__
            what = f"DeepSpeed {found} keeps its state otherwise than loomtune knows: it has no {', '.join(missing)}"
            raise UserError.of(what, f"pip install deepspeed=={TRIED}, or set sharding=fsdp")

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each flat tensor."""
        return list(getattr(self.zero, self.GROUPS))

    @property
    def flats(self) -> list[Tensor]:
        """The masters, fp32, padded at the end."""
        return list(getattr(self.zero, self.FLATS))

    @abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """What lies where in the masters; not the padding."""

    @property
    def offloads(self) -> bool:
        """True where gradients wait for the step in host memory."""
        return bool(getattr(self.zero, self.OFFLOADS))

    @property
    def late(self) -> bool:
        """True where no micro-batch may be called the last: its gradients alone would reach the optimizer."""
        return self.offloads

    def gradients(self) -> list[Tensor]:
        """This rank's part of the reduced gradients, before the step."""
        return [part for parts in self.zero.averaged_gradients.values() for part in parts or ()]

    def deliver(self) -> None:
        """Hands the gradients, as they are now, to the optimizer."""
        return

    def forget(self) -> None:
        """Drops the gradients of this step, as if there had been no backward pass."""
        self.zero.zero_grad(set_to_none=True)
        self._drop()
        if self.offloads:
            self.zero.reset_cpu_buffers()
            for flat in self.flats:
                if flat.grad is not None:
                    flat.grad.zero_()

    def _synchronize(self) -> None:
        """Waits for what is still on its way to the host."""
        if self.world.device.type != "cpu":
            torch.accelerator.synchronize()

    @abstractmethod
    def _drop(self) -> None:
        """Drops the parts of gradients that were reduced."""

    @abstractmethod
    def publish(self) -> None:
        """Makes changed masters the parameters that compute. Collective."""

    @abstractmethod
    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A trained parameter, fp32, on every rank. Collective."""

    def state(self, group: int) -> dict[str, Any]:
        """What torch's optimizer keeps for a flat tensor, to be read and changed."""
        return self.torch.state[self.flats[group]]  # type: ignore[no-any-return]

    def counts_nearby(self, group: int) -> bool:
        """True where torch's kernel wants the count of steps on the device of the parameters."""
        options = self.torch.param_groups[self._origin(group)]
        return bool(options.get("fused") or options.get("capturable"))

    def _origin(self, group: int) -> int:
        """The parameter group of torch's optimizer that a flat tensor is of."""
        return group

    @contextmanager
    def resident(self, group: int) -> Iterator[None]:
        """Within it masters and state of a group are in memory, wherever they lie otherwise; changes last."""
        yield


class Stages12(Partitions):
    """Parameters whole on every rank."""

    GROUPS, FLATS, OFFLOADS = "bit16_groups", "single_partition_of_fp32_groups", "cpu_offload"
    KNOWN = (
        *("all_grad_tensors", "micro_step_id", "partition_gradients", "finalize_gradient_accumulation_boundary"),
        *("update_lp_params", "_hp_optimizer_states_linked"),
    )

    def fragments(self) -> Iterator[Fragment]:
        for group, parameters in enumerate(self.groups):
            for parameter in parameters:
                if (linked := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                    begin, count = linked.lp_fragment_address.start, linked.lp_fragment_address.numel
                    at = linked.hp_fragment_address.start
                    yield Fragment(parameter, shape(parameter), begin, begin + count, group, at)

    @property
    def late(self) -> bool:
        return self.offloads and bool(self.zero.partition_gradients)

    def gradients(self) -> list[Tensor]:
        if not self.offloads:
            return super().gradients()
        if self.late:
            self.zero.finalize_gradient_accumulation_boundary()
        self._synchronize()
        return [flat.grad for flat in self.flats if flat.grad is not None]

    def _drop(self) -> None:
        self.zero.micro_step_id = -1
        for group in range(len(self.groups)):
            self.zero.averaged_gradients[group] = self.zero.all_grad_tensors[group] = None
        if self.offloads:
            for gradient in self.zero.accumulated_grads_in_cpu.values():
                gradient.zero_()

    def publish(self) -> None:
        self.zero.update_lp_params()
        self.zero._hp_optimizer_states_linked = False  # it links views of the state, which may be another now

    def whole(self, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter.detach()
        return parameter.get_full_hp_param()  # type: ignore[attr-defined, no-any-return]


class Stage3(Partitions):
    """Each parameter in equal parts, the last one padded."""

    GROUPS, FLATS, OFFLOADS = "fp16_groups", "fp32_partitioned_groups_flat", "offload_optimizer"
    KNOWN = (
        *("grad_partitions_flat_buffer", "get_full_hp_param", "checkpoint_event_prologue", "checkpoint_event_epilogue"),
        *("finalize_gradient_accumulation_boundary", "_offload_boundary_param_ids"),
        *("sub_group_to_group_id", "_reassign_or_swap_out_partitioned_parameters", "_swappable_optimizer_subgroup"),
    )

    def fragments(self) -> Iterator[Fragment]:
        for group, parameters in enumerate(self.groups):
            at = 0
            for parameter in parameters:
                size, numel = parameter.partition_numel(), parameter.ds_numel  # type: ignore[attr-defined]
                begin = min(self.world.rank * size, numel)
                yield Fragment(parameter, shape(parameter), begin, min(begin + size, numel), group, at)
                at += size

    def gradients(self) -> list[Tensor]:
        self._synchronize()
        return [self.zero.grad_partitions_flat_buffer]

    def deliver(self) -> None:
        if self.offloads:
            self.zero.finalize_gradient_accumulation_boundary()

    def _drop(self) -> None:
        self.zero.averaged_gradients = {}
        self.zero.grad_partitions_flat_buffer.zero_()  # what `averaged_gradients` shows parts of
        self.zero._offload_boundary_param_ids = set()

    def _origin(self, group: int) -> int:
        return int(self.zero.sub_group_to_group_id[group])

    @contextmanager
    def resident(self, group: int) -> Iterator[None]:
        swapped = self.zero._swappable_optimizer_subgroup(group)
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_out(group)

    def publish(self) -> None:
        self.zero.checkpoint_event_prologue()
        for group in range(len(self.groups)):
            with self.resident(group):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.checkpoint_event_epilogue()

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return self.zero.get_full_hp_param(parameter)  # type: ignore[no-any-return]


@contextmanager
def gathered(parameter: nn.Parameter, world: World) -> Iterator[Tensor]:
    """Within it any parameter, trained or frozen, whole and in the type of computation. Collective."""
    if not hasattr(parameter, "ds_id"):
        yield parameter.detach()
        return
    with _imported(world.device.type).zero.GatheredParameters([parameter]):
        yield parameter.detach()


def backward(engine: Any, loss: Tensor, world: World) -> None:
    """Adds the gradients of a loss to those of this step; over ranks they are summed."""
    zero = engine.optimizer
    zero.clear_backward_seen_flag()
    zero.backward_prologue()
    zero.enter_backward()
    averaged_over = world.size if engine.zero_optimization_stage() == 3 else 1
    engine.backward(loss * averaged_over, scale_wrt_gas=False)


def settle(engine: Any) -> None:
    """Frees what a forward pass without a backward pass left gathered."""
    getattr(engine.optimizer, "empty_partition_cache", int)()  # stages 1 and 2 gather nothing


def destroy(engine: Any) -> None:
    """Takes DeepSpeed's hooks and buffers away, so that nothing keeps the network alive."""
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK  # every network of stage 3 stays at its bottom
    stack[:] = [module for module in stack if module is not engine.module]
