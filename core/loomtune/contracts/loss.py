"""Variants of loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """What a loss knows of pairs of answers: one entry a pair, of a micro-batch or of a whole step.

    beta: how strongly a preference counts, as the objective says.
    chosen, rejected: `(pairs,)` fp64, summed log-probabilities under the policy, in nats, with gradient.
    reference_chosen, reference_rejected: the same under the reference; zeros where the objective has none.
    chosen_tokens, rejected_tokens: `(pairs,)`, how many targets were summed.
    importance: `(pairs,)`, without gradient, what each pair's losses are multiplied with.
    prompt, prompt_tokens: the same of the prompts; zeros unless the objective learns them.
    chosen_logits, rejected_logits: `(pairs,)`, how much each answer is preferred to the reference; the log-ratio,
        unless the objective's divergence makes something else of it.
    distances: of each `DistributionLoss`, `(pairs,)`, its `distance` summed over the targets of the pair.
    probability: `(pairs,)`, how likely the chosen answer is the better one; None: it is.
    """

    beta: float
    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    prompt: Tensor
    prompt_tokens: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    importance: Tensor
    distances: Mapping[DistributionLoss, Tensor] = field(default_factory=dict)
    probability: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """`(pairs,)`: how much more the chosen answer is preferred than the rejected one."""
        return self.chosen_logits - self.rejected_logits


class Loss(ABC):
    """A variant for the objectives that take one: from log-probabilities of answers to a loss for each pair.

    weight: its share in a mixture. by_tokens: True where it is a sum over the tokens of chosen answers (and of prompts,
    where these are learned), and so divided by their number in the whole step; else by the number of pairs.
    needs_reference: True where it means nothing without one.
    by_means: True where it divides an answer's log-probability by its tokens, so that all of them have to count whole.
    by_preference: True where it looks at `Pairs.logits` or its parts, which are what a divergence changes.
    looks_around: True where a pair's loss depends on the other pairs of the step.
    by_probability: True where it heeds `Pairs.probability`.
    """

    weight: float = 1.0
    by_tokens: bool = False
    needs_reference: bool = False
    by_means: bool = False
    by_preference: bool = False
    looks_around: bool = False
    by_probability: bool = False

    def statistics(self, step: Sequence[Pairs], world: World) -> Any:
        """What `of` needs of the whole step, called under `no_grad` on every rank where `looks_around`.

        step: this rank's micro-batches. world: offers sums and gathers over data replicas.
        """
        return None

    @abstractmethod
    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        """`(pairs,)` losses, the weight not multiplied in."""


class DistributionLoss(Loss):
    """A loss that compares whole distributions over the vocabulary: those of the policy and of a frozen reference.

    It is a sum over the targets of both answers and divided by their number in the whole step; no pair's importance
    counts, because what it compares are not answers. Supervised fine-tuning takes such losses too, by `distance` alone.
    """

    needs_reference = True

    @abstractmethod
    def distance(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Of logits `(n, vocabulary)` fp32 of both, without gradient in the second, a number `(n,)` for each target.

        Asked for a chunk of targets at a time. Gradients are taken there, as of a sum: each counts alike.
        """

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        """`(pairs,)`: the distances of their targets."""
        return pairs.distances[self]
