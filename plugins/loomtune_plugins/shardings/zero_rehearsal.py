"""ZeRO without storage and without peers: DeepSpeed's own code, on tensors that hold nothing.

No double of it, which would be another program: DeepSpeed 0.19.8 runs on fake tensors (torch 2.13) as it is, but for

| DeepSpeed | what it asks | what it is told |
|---|---|---|
| `zero/partitioned_param_coordinator.py`, `reset_step` | did rank 0 run the modules in this order too | it did |
| `zero/stage3.py`, `zero/stage_1_and_2.py`, `step` | did a gradient overflow, is the norm a number | none did, it is |
| `zero/stage_1_and_2.py`, `__init__` | is the first partition's address aligned | 0 is, of which torch warns |
| the same | is there memory to flatten parameters on the device | there is: it would go by the host |

It asks by the same messages, which are seen. For an accelerator, whose host has memory of its own, see `zero_hosting`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loomtune.contracts import Batch, EngineSpec, Reader
from loomtune.world import World
from loomtune_plugins.shardings.deepspeed_engine import imported
from loomtune_plugins.shardings.deepspeed_state import Partitions
from loomtune_plugins.shardings.settings import ZeroSettings
from loomtune_plugins.shardings.zero_engine import ZeroEngine
from loomtune_plugins.shardings.zero_hosting import hosting

FLAGS = (torch.bool, torch.uint8)
"""Types in which DeepSpeed says that something is wrong."""


class RehearsedZero(ZeroEngine):
    """The engine itself, told what tensors without values cannot say.

    kind: of the device that the run is for, as in `Hardware`: what DeepSpeed is told of it decides its buffers.
    """

    def __init__(
        self,
        spec: EngineSpec,
        world: World,
        settings: ZeroSettings,
        sequence: dist.ProcessGroup | None = None,
        kind: str = "",
    ) -> None:
        if kind not in ("", "cpu"):
            self.device_type = "cuda"
        self._offloads = settings.offload != "none" and self.device_type == "cuda"
        with _believing(world), hosting(self._offloads):
            super().__init__(spec, world, settings, sequence)

    def forward(self, batch: Batch, reader: Reader, *, adapter: bool = True) -> Any:
        with _believing(self.world):
            return super().forward(batch, reader, adapter=adapter)

    def backward(self, loss: Tensor) -> None:
        with _believing(self.world):
            super().backward(loss)

    def step(self, rate: float, clip: float, proceed: Callable[[float], bool]) -> float:
        with _believing(self.world), hosting(self._offloads), Sound():  # type: ignore[no-untyped-call]
            return super().step(rate, clip, proceed)

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """(cause, tensor) of what this rank holds besides parameters that are whole; causes as in the planner's trace.

        Its parts of parameters, masters and torch's state of them, reduced gradients, and the buckets they go through.
        """
        cause = "parameters" if self.spec.optimizer else "roles"
        for parameter in self.network.parameters():
            if (part := getattr(parameter, "ds_tensor", None)) is not None:
                yield cause, part
            if (sums := getattr(parameter, "grad_accum", None)) is not None:
                yield "gradients", sums
        if self.partitions is not None:
            yield from _held(self.partitions)


def _held(partitions: Partitions) -> Iterator[tuple[str, Tensor]]:
    zero = partitions.zero
    for group, flat in enumerate(partitions.flats):
        yield "optimizer", flat
        yield from (("optimizer", one) for one in partitions.state(group).values() if isinstance(one, Tensor))
        if flat.grad is not None:
            yield "gradients", flat.grad
    parts = [one for several in zero.averaged_gradients.values() for one in several or ()]
    parts += getattr(zero, "accumulated_grads_in_cpu", {}).values()
    whole = getattr(zero, "grad_partitions_flat_buffer", None)
    yield from (("gradients", one) for one in [*parts, whole] if one is not None)
    for bucket in zero.ipg_buckets.values():
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        yield from (("gathered", one) for one in buffers if one is not None)


class Sound(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it no flag is raised."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype in FLAGS:
            return False
        return func(*args, **(kwargs or {}))


@contextmanager
def _believing(world: World) -> Iterator[None]:
    """Within it ranks tell each other what they would compare, and take it for the same."""
    imported(world.device.type)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    with (
        mock.patch.object(coordinator, "assert_ints_same_as_other_ranks", _tell),
        mock.patch.object(get_accelerator(), "available_memory", lambda device=None: sys.maxsize),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


def _tell(numbers: list[int]) -> None:
    """How many there are, then these, from rank 0 (`zero/utils.py`)."""
    for told in (len(numbers), numbers):
        dist.broadcast(torch.tensor(told, dtype=torch.int64), src=0)
