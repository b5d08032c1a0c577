"""Supervised fine-tuning with the focal loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loomtune.contracts import Batch, LossSums, Objective, Row, Sample, Segment, Tokenizer
from loomtune.contracts.objective import Roles, Totals
from loomtune.errors import UserError
from loomtune_acme.settings import FocalSettings


class Focal(Objective):
    """-(1 - p)^gamma log p, summed over the target tokens, p being the probability of the target.

    Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 4, with alpha = 1. gamma = 0 is cross-entropy.
    """

    def __init__(self, settings: FocalSettings) -> None:
        if 0 < settings.gamma < 1 or settings.gamma < 0:
            # Between 0 and 1 the derivative of (1 - p)^gamma is infinite where p is 1.
            raise UserError.of(f"objective.gamma={settings.gamma} is neither 0 nor at least 1", "set objective.gamma=2")
        self.gamma = settings.gamma

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """Prompt, completion and end token in one segment; the last two are learned."""
        if "completion" not in row:
            raise ValueError("has no completion, which objective=focal learns from")
        begin = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        prompt = [*begin, *tokenizer.encode(row.get("prompt", ""))]
        tokens = [*prompt, *tokenizer.encode(row["completion"]), tokenizer.eos_id]
        is_target = np.arange(len(tokens)) >= max(len(prompt), 1)  # nothing comes before the first token
        return Sample((Segment(np.array(tokens[:max_length], np.int32), is_target[:max_length]),))

    def fingerprint(self) -> str:
        """Changes whenever `sample` would give other tokens for the same row: gamma has no part in that."""
        return "acme-focal-1"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The number of target tokens: the loop divides by it once, over all micro-batches and ranks."""
        return {"loss": float(len(batch.target))}

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """Sums, never means. torch is imported here, because samples are made without it."""
        import torch

        from loomtune.toolkit import log_probs

        log_p = log_probs(roles["policy"], batch)
        focal = -((1 - log_p.exp()) ** self.gamma) * log_p
        known = (log_p.detach() > np.log(0.5)).sum(), torch.tensor(len(batch.target))
        return LossSums({"loss": focal.sum()}, {"known": known})
