"""What improves a policy: functions of importance ratios and advantages, one number a target, to be minimised."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loomtune.toolkit import row_sums

if TYPE_CHECKING:
    from loomtune.contracts import Batch
    from loomtune_plugins.objectives.online.grpo_settings import GrpoSettings
    from loomtune_plugins.objectives.online.watching import Metrics


def lengths(batch: Batch) -> Tensor:
    """`(targets,)`: how many targets the completion of each has."""
    counts = torch.bincount(batch.row, minlength=len(batch.parents))
    return counts[batch.row].float()


def sequence_log_ratio(log_ratio: Tensor, batch: Batch, *, mean: bool) -> Tensor:
    """`(targets,)`: the log-ratio of each target's whole completion, or its mean over tokens, with gradient."""
    sums = row_sums(log_ratio, batch).float()[batch.row]
    return sums / lengths(batch) if mean else sums


def clipped(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float, ceiling: float | None = None
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) (Schulman et al. 2017, "PPO", equation 7), and the ratio r.

    ceiling: no ratio counts more where the advantage is negative (Ye et al. 2020, dual clip; Intellect-2).
    """
    ratio = log_ratio.exp()
    free = ratio if ceiling is None else ratio.clamp(max=ceiling)
    return -torch.minimum(free * advantage, ratio.clamp(1 - low, 1 + high) * advantage), ratio


def clip_shares(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Metrics:
    """How many targets' ratios lie beyond each bound, on the side on which nothing more is to be gained."""
    beyond = {
        "clip/low": (ratio < 1 - low) & (advantage < 0),
        "clip/high": (ratio > 1 + high) & (advantage > 0),
    }
    return {name: (which.sum().float(), ratio.new_tensor(float(len(ratio)))) for name, which in beyond.items()}


def cispo(log_ratio: Tensor, log_probs: Tensor, advantage: Tensor, high: float) -> tuple[Tensor, Tensor]:
    """-sg(min(r, 1 + high)) A log p (MiniMax 2025, "MiniMax-M1", equation 4): a clipped ratio has a gradient still."""
    ratio = log_ratio.exp()
    return -ratio.detach().clamp(max=1 + high) * advantage * log_probs, ratio


def sapo(log_ratio: Tensor, advantage: Tensor, positive: float, negative: float) -> tuple[Tensor, Tensor]:
    """-4/t sigmoid(t (r - 1)) A (Gao et al. 2025, "Soft Adaptive Policy Optimization"), t by the sign of A."""
    ratio = log_ratio.exp()
    heat = torch.where(advantage > 0, positive, negative)
    return -torch.sigmoid(heat * (ratio - 1)) * 4 / heat * advantage, ratio


def vespo(
    log_ratio: Tensor, log_probs: Tensor, advantage: Tensor, batch: Batch, settings: GrpoSettings
) -> tuple[Tensor, Tensor]:
    """-sg(phi(w)) A log p with phi(w) = w^k exp(lambda (1 - w)) of the sequence's ratio w ("VESPO", 2602.10693).

    As TRL has it, a token's log-ratio counts within 20 nats, and a sequence's from log 1e-8 to 20.
    """
    log_w = sequence_log_ratio(log_ratio.detach().clamp(-20, 20), batch, mean=False).clamp(math.log(1e-8), 20)
    wanted = advantage >= 0
    power = torch.where(wanted, settings.vespo_k_pos, settings.vespo_k_neg)
    rate = torch.where(wanted, settings.vespo_lambda_pos, settings.vespo_lambda_neg).clamp(min=1e-4)
    phi = (rate + power * log_w - rate * log_w.exp()).exp()
    return -phi * advantage * log_probs, log_ratio.exp()


def policy(settings: GrpoSettings, log_probs: Tensor, old: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """`(targets,)` each: what the variant minimises, and the ratio, with gradient."""
    advantage, log_ratio = batch.columns["advantage"], log_probs - old
    low, high = settings.clip
    if settings.variant == "cispo":
        return cispo(log_ratio, log_probs, advantage, high)
    if settings.variant == "sapo":
        return sapo(log_ratio, advantage, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
    if settings.variant == "vespo":
        return vespo(log_ratio, log_probs, advantage, batch, settings)
    if settings.by_sequence:
        log_ratio = sequence_log_ratio(log_ratio, batch, mean=True)
    return clipped(log_ratio, advantage, low, high, settings.clip_ceiling)
