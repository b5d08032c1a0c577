"""Sampling as greedy choice: Gumbel noise of each row's own on top of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loomtune.contracts import Sampling
from loomtune.world import derive

STEP, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Constants of SplitMix64, as int64 holds them."""


class RowNoise:
    """Adds Gumbel noise to scores, other noise to each row of a batch.

    The largest of log-probabilities plus independent Gumbel noise is a draw from them (Gumbel 1954; Maddison et al.
    2014, "A* Sampling", section 2). The noise of a token is a function of the row's key, how many tokens were
    written before it, and its id: of no other row, of no padding, and of no state that a device keeps.
    """

    def __init__(self, keys: Sequence[int], length: int) -> None:
        """length: of the prompts, padding included."""
        self._keys, self._length = keys, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(rows, vocabulary)` with noise. input_ids: `(rows, length + tokens written)`."""
        written = input_ids.shape[1] - self._length
        keys = [derive(key, "rollout", written) for key in self._keys]
        return scores.float() + gumbel(torch.tensor(keys, device=scores.device), scores.shape[-1])

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


def gumbel(keys: Tensor, count: int) -> Tensor:
    """`(keys, count)` fp32: `count` draws for each key, an int64.

    -log(E) of an exponential E = -log(1 - u). As u is small where the noise is large, its floating point reaches tokens
    of any probability, which a grid of 2^-24 would not.
    """
    bits = random_bits(keys, count)
    uniform = bits.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1).float().add_(0.5).mul_(2.0**-53)
    return uniform.clamp_(max=1 - 2**-24).neg_().log1p_().neg_().log_().neg_()


def random_bits(keys: Tensor, count: int) -> Tensor:
    """`(keys, count)` int64: the first outputs of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number
    generators", figure 17) from each key as its state. Integers wrap around, alike on every device."""
    bits = keys.unsqueeze(1) + torch.arange(1, count + 1, device=keys.device) * STEP
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        # The sign is shifted in, and masked away.
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return bits
