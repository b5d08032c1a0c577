"""Where DeepSpeed keeps the trained parameters, their gradients and the optimizer's state.

This file and `deepspeed_engine` are the ones to read again when DeepSpeed changes.

| DeepSpeed | tried with | what was found |
|---|---|---|
| 0.19.8 | torch 2.13, CPU (gloo) | everything in both |

A trained parameter lies flattened in a group, beside the others with its decay and rate. Each rank holds a part of each
group in fp32 (the *masters*), and torch's optimizer knows these flat tensors only. In stages 1 and 2 the group as a
whole is cut into equal parts, in stage 3 each parameter is. What DeepSpeed does that is not seen from outside:

- A fresh engine has no optimizer state: it is made for a flat tensor, which is the key that torch looks it up by.
- Masters and the parameters that compute are different tensors: who changes masters must `publish` them.
- Stage 3, and 2 offloaded, copy the first micro-batch's gradients over those of the last step, and add later ones. A
  parameter that is first used in the second would get the last step's gradient as well: hence `forget`.
- Offloaded, stages 2 and 3 give the optimizer only gradients of parameters that the last micro-batch used. So none is
  called the last (`late`), and all that came together is handed over before the step.
- Stage 3, and 1 and 2 offloaded, take the norm once more and leave a step out where it is not finite. Whether a step is
  taken is for guards to say, in every strategy alike, so they are told of a norm of 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.errors import UserError
from loomtune.world import World
from loomtune_plugins.shardings.deepspeed_engine import TRIED, imported
from loomtune_plugins.shardings.flat import Fragment


def shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter, also while only a part of it is there."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Partitions(ABC):
    """What this rank holds of the trained parameters of a ZeRO optimizer."""

    GROUPS: str
    FLATS: str
    OFFLOADS: str
    """Attributes of the ZeRO optimizer that `groups`, `flats` and `offloads` are read from."""
    NORM: tuple[str, Any]
    """Its method that takes a norm, and what says 1 in its words."""
    KNOWN: tuple[str, ...]
    """Others that are relied upon."""

    def __init__(self, engine: Any, world: World) -> None:
        self.zero, self.torch, self.world = engine.optimizer, engine.basic_optimizer, world
        known = (self.GROUPS, self.FLATS, self.OFFLOADS, self.NORM[0], "averaged_gradients", "zero_grad", *self.KNOWN)
        if missing := [name for name in known if not hasattr(self.zero, name)]:
            found = imported(world.device.type).__version__
            what = f"DeepSpeed {found} keeps its state otherwise than loomtune knows: it has no {', '.join(missing)}"
            raise UserError.of(what, f"pip install deepspeed=={TRIED}, or set sharding=fsdp")
        method, one = self.NORM
        setattr(self.zero, method, lambda: one)

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
    NORM = "scaled_global_norm", torch.ones(())
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
    NORM = "_get_norm_groups", [torch.ones(())]
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
