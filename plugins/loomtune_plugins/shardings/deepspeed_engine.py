"""How DeepSpeed is started, told of passes and stopped. With `deepspeed_state`, all that is known of its insides.

- It finds out that a backward pass begins by hooks on what `DeepSpeedEngine.forward` gives, which must be tensors in
  plain containers and of one forward pass only. So networks are called directly, and passes announced in `backward`.
- Stage 3 gathers a module's parameters when it is called, and wants modules called equally often and in the same order
  on every rank. Heads are not (`Reading`): otherwise ranks meet in different collectives and hang or crash.
- Joining builds a C++ operator for shared memory, for a minute, and a killed build leaves a lock on which every later
  start hangs. It builds what its own table calls compatible, and nothing that is used here needs any.
- It makes a process group of its own, with a time-out of its own, unless it finds one in `groups._WORLD_GROUP`.
- In bf16 with gradients in fp32, stage 1 would be another optimizer, of another layout: `start` asks for ZeRO's own.
"""

from __future__ import annotations

import logging
import os
import warnings
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
from loomtune_plugins.shardings.flat import boxes
from loomtune_plugins.shardings.zero_config import Configuration

TRIED = "0.19.8"
Read = Callable[[tuple[slice, ...]], Tensor]
"""The values of a region of a parameter."""


def join(world: World, *, disk: bool) -> None:
    """Imports DeepSpeed in silence and lets it use the process group that there is. disk: state is to lie on one."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    deepspeed = imported(world.device.type)
    deepspeed.utils.groups._WORLD_GROUP = dist.group.WORLD
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    if disk and not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError.of("DeepSpeed cannot build its async_io here", "install libaio's headers (Debian: libaio-dev)")


@cache
def imported(device: str) -> Any:
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
        self._init = imported(world.device.type).zero.Init(config_dict_or_path=config)
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
    deepspeed = imported(world.device.type)

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
            imported(parameter.device.type).zero.register_external_parameter(network.reading, parameter)
    theirs = [id(hooks) for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in theirs:
            handle.remove()


@contextmanager
def gathered(parameter: nn.Parameter, world: World) -> Iterator[Tensor]:
    """Within it any parameter, trained or frozen, whole and in the type of computation. Collective."""
    if not hasattr(parameter, "ds_id"):
        yield parameter.detach()
        return
    with imported(world.device.type).zero.GatheredParameters([parameter]):
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
