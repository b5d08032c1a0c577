"""The optimizer's step of AdaLoRA: a penalty before it, and after it ranks that are shared out by importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from loomtune.contracts import StateKind
from loomtune_plugins.adapters.adalora_settings import AdaLoraSettings

SENSITIVITY, UNCERTAINTY, COUNT = "exp_avg_ipt", "exp_avg_unc", "allocator_step"
"""What is kept of each parameter, by peft's names; and the steps done, which peft is told."""

Parts = Mapping[str, nn.Parameter]
"""`lora_A` `(rank, inputs)`, `lora_E` `(rank, 1)` and `lora_B` `(outputs, rank)` of a layer."""


KEPT = {SENSITIVITY: StateKind.LIKE, UNCERTAINTY: StateKind.LIKE, COUNT: StateKind.SCALAR}


class Allocator:
    """peft 0.21's `RankAllocator`, with its memory in the optimizer's state, of parameters that may be sharded.

    Steps count from 1. In the last `tfinal` ones importance stands still, so the mask follows from the state alone.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: AdaLoraSettings, steps: int, layers: Sequence[Parts]
    ) -> None:
        assert settings.tinit is not None and settings.tfinal is not None
        self._optimizer, self._settings, self._layers = optimizer, settings, layers
        self._begin, self._end = settings.tinit, steps - settings.tfinal
        self._all = sum(layer["lora_E"].shape[0] for layer in layers)
        self._target = settings.target_rank * len(layers)
        self._final: list[Tensor] = []

    def join(self) -> None:
        """Hooks into each step of the optimizer."""
        self._optimizer.register_step_pre_hook(lambda *_: self.penalise())
        self._optimizer.register_step_post_hook(lambda *_: self.allocate())

    @torch.no_grad()
    def penalise(self) -> None:
        """Adds the gradient of `weight * mean of |P P^T - 1|` over all A and B: equation 4 without squares."""
        share = self._settings.orth_reg_weight / (2 * len(self._layers))
        for layer in self._layers if share else ():
            for part in ("lora_A", "lora_B"):
                if (gradient := layer[part].grad) is not None:
                    added = _orthogonal(_whole(layer[part]), rows=part == "lora_A")
                    _local(gradient).add_(_part(added, gradient), alpha=share)

    @torch.no_grad()
    def allocate(self) -> None:
        """Updates the importances and sets the least important entries of E to 0, as far as the budget says."""
        step = self._count() + 1
        for parameter in (parameter for layer in self._layers for parameter in layer.values()):
            if parameter.grad is not None:
                self._remember(parameter, step)
        if (budget := self.budget(step)) is not None:
            self._mask(budget, step)

    def budget(self, step: int) -> int | None:
        """Entries of E that are left after a step, of all layers (section 3.3); None where they stay as they are."""
        if step >= self._end:
            return self._target
        if step <= self._begin or step % self._settings.delta_t:
            return None
        left = 1 - (step - self._begin) / (self._end - self._begin)
        return int((self._all - self._target) * left**3 + self._target)

    def _count(self) -> int:
        """Steps done, from the state, which may have been loaded since the last one."""
        states = (self._optimizer.state.get(parameter, {}) for layer in self._layers for parameter in layer.values())
        return next((int(state[COUNT]) for state in states if COUNT in state), 0)

    def _remember(self, parameter: nn.Parameter, step: int) -> None:
        """Of each entry (section 3.2). Keys come after the inner step: to AdamW an empty state is a fresh one."""
        state, settings = self._optimizer.state[parameter], self._settings
        state[COUNT] = torch.tensor(float(step))
        if step >= self._end:
            return
        for key in (SENSITIVITY, UNCERTAINTY):
            state.setdefault(key, torch.zeros_like(parameter))
        mean, unsure = _local(state[SENSITIVITY]), _local(state[UNCERTAINTY])
        now = (_local(parameter) * _local(_known(parameter.grad))).abs()
        mean.copy_(settings.beta1 * mean + (1 - settings.beta1) * now)
        unsure.copy_(settings.beta2 * unsure + (1 - settings.beta2) * (now - mean).abs())

    def _mask(self, budget: int, step: int) -> None:
        """Of the last steps, the first one decides; a run that is resumed after it decides again, and alike."""
        kept = self._final if step > self._end and self._final else self._kept(budget)
        self._final = kept if step >= self._end else []
        for layer, keep in zip(self._layers, kept, strict=True):
            entries = layer["lora_E"]
            _local(entries).masked_fill_(~_part(keep, entries), 0.0)

    def _kept(self, budget: int) -> list[Tensor]:
        """Which entries of E stay, `(rank, 1)` bool of each layer: all but the least important of all layers."""
        scores = [self._score(layer) for layer in self._layers]
        if (dropped := self._all - budget) == 0:
            return [torch.ones_like(score, dtype=torch.bool) for score in scores]
        bar = torch.kthvalue(torch.cat(scores).flatten(), dropped).values
        return [score > bar for score in scores]

    def _score(self, layer: Parts) -> Tensor:
        """`(rank, 1)`: importance of E's entry and the mean of those in A's row and B's column."""
        a, b, e = (self._importance(layer[part]) for part in ("lora_A", "lora_B", "lora_E"))
        return e + torch.stack([a.mean(dim=1), b.mean(dim=0)], dim=1).sum(dim=1, keepdim=True)

    def _importance(self, parameter: nn.Parameter) -> Tensor:
        """Of each entry, whole on every rank: sums over parts of it would hang on how it is cut."""
        state = self._optimizer.state.get(parameter, {})
        if SENSITIVITY not in state:  # no gradient has come yet
            return _whole(torch.zeros_like(parameter))
        return _whole(state[SENSITIVITY]) * _whole(state[UNCERTAINTY])


def _orthogonal(part: Tensor, rows: bool) -> Tensor:
    """The gradient of `|P P^T - 1|`, the Frobenius norm over P's rows or columns; 0 where it has none."""
    gram = part @ part.T if rows else part.T @ part
    off = gram.sub_(torch.eye(len(gram), device=gram.device, dtype=gram.dtype))
    gradient = (off @ part if rows else part @ off).mul_(2.0)
    norm = torch.linalg.matrix_norm(off)
    return torch.where(norm > 0, gradient / norm, 0.0)


def _known(tensor: Tensor | None) -> Any:
    assert tensor is not None, "asked for only where there is a gradient"
    return tensor


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its storage."""
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def _whole(tensor: Tensor) -> Tensor:
    held = tensor.detach()
    return held.full_tensor() if isinstance(held, DTensor) else held


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every rank has, what this rank holds of one that is laid out so."""
    if not isinstance(like, DTensor):
        return whole
    cut = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return cut.to_local().to(like.to_local().device)
