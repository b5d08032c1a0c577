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


class Choice:
    """Chooses the next token of each row: the most probable one, or one that is drawn by noise of the row's own.

    The largest of log-probabilities plus independent Gumbel noise is a draw from them (Gumbel 1954; Maddison et al.
    2014, "A* Sampling", section 2). The noise of a token is a function of the row's key, how many tokens were
    written before it, and its id: of no other row, of no padding, and of no state that a device keeps.
    """

    def __init__(self, sampling: Sampling) -> None:
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self.temperature = float(sampling.temperature)
        self.cuts: list[Any] = []
        if self.temperature > 0 and sampling.top_k > 0:
            self.cuts.append(TopKLogitsWarper(sampling.top_k))
        if self.temperature > 0 and sampling.top_p < 1:
            self.cuts.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: Tensor, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores `(rows, vocabulary)` of which the largest is the choice, the tokens chosen `(rows,)`, and the
        log-probabilities `(rows,)` of these, fp32, of all that could have been drawn before any cut.

        logits: `(rows, vocabulary)`. places: each row's key, and how many tokens it has written.
        """
        tempered = logits.float() / self.temperature if self.temperature > 0 else logits.float()
        scores = tempered
        for cut in self.cuts:
            scores = cut(None, scores)
        if self.temperature > 0:
            keys = [derive(key, "rollout", written) for key, written in places]
            scores = scores + gumbel(torch.tensor(keys, device=scores.device), scores.shape[-1])
        tokens = scores.argmax(-1)
        chosen = tempered.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return scores, tokens, chosen - tempered.logsumexp(-1)


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
