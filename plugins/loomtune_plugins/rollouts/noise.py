"""Sampling as greedy choice: Gumbel noise of each row's own on top of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loomtune.contracts import Sampling
from loomtune.world import derive


class RowNoise:
    """Adds Gumbel noise to scores, from one generator for each row of a batch.

    The largest of log-probabilities plus independent Gumbel noise is a draw from them (Gumbel 1954; Maddison et al.
    2014, "A* Sampling", section 2). Unlike a draw from the global state, it depends on no other row of the batch.
    """

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(derive(seed, "rollout", number)) for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(rows, vocabulary)` with noise; drawn on the CPU, so that every kind of device has the same."""
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=row) for row in self._generators])
        gumbel = -torch.log(-torch.log(uniform.clamp_(torch.finfo(uniform.dtype).tiny, 1 - 2**-24)))
        return scores.float() + gumbel.to(scores.device)

    def processors(self, sampling: Sampling) -> Any:
        """What transformers applies to the scores, in order: temperature, the cuts, the noise; nothing where greedy."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        if sampling.temperature <= 0:
            return LogitsProcessorList()
        chosen: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k > 0:
            chosen.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            chosen.append(TopPLogitsWarper(sampling.top_p))
        return LogitsProcessorList([*chosen, self])
