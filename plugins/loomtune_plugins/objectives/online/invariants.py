"""What has to hold before anything is learned of a batch: else what is learned is not what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loomtune.errors import Fault, UserError

if TYPE_CHECKING:
    from loomtune.contracts import Rollout

BOUNDS = {"fp32": (1e-3, 0.05), "bf16": (0.05, 2.0)}
"""Mean and largest difference, in nats, between two computations of the same log-probabilities. What rounding makes is
some 1e-6 and 1e-4 in fp32, and 0.01 and 0.3 in bf16."""


LATER, OLDER, FIRST, FRESH = 0.0, 1.0, 2.0, 3.0
"""What a sample's number `first` says of its step: a later one of its batch; the first, of a batch that an older policy
drew, so that nothing has to agree; the first; the first of all the run, whose policy still is what its reference is."""


class Disagreement(UserError):
    """Rollout and training, or two readings of the same policy, do not say the same of a completion."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How far two computations of the same log-probabilities lie apart, over some targets."""

    total: float = 0.0
    largest: float = 0.0
    count: float = 0.0

    @property
    def mean(self) -> float:
        """In nats; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    @classmethod
    def joined(cls, parts: Sequence[Apart]) -> Apart:
        """Over the targets of all parts."""
        largest = max((part.largest for part in parts), default=0.0)
        return cls(sum(part.total for part in parts), largest, sum(part.count for part in parts))

    def exceeds(self, bounds: tuple[float, float]) -> bool:
        """Also where one is no number."""
        return not (self.mean <= bounds[0] and self.largest <= bounds[1])


@dataclass(frozen=True, slots=True)
class Bounds:
    """rollout: mean and largest difference to what the engine said. reading: of two readings by training's own pass."""

    rollout: tuple[float, float] = BOUNDS["fp32"]
    reading: tuple[float, float] = BOUNDS["fp32"]

    @classmethod
    def of(cls, precision: str, engine: Rollout | None = None) -> Bounds:
        """By the precision; an engine that computes otherwise says itself how far that may be."""
        own = engine.apart if engine else None
        return cls(own or BOUNDS[precision], BOUNDS[precision])

    def check(self, rollout: Apart, ratio: Apart, kl: Apart) -> None:
        """Raises Disagreement with all that does not hold. Apart from the reference: where the policy is fresh."""
        faults = []
        if rollout.exceeds(self.rollout):
            what = f"rollout and training disagree: {_said(rollout, self.rollout)} between the log-probabilities of"
            what += " completions as the rollout engine drew them and as training computes them"
            cure = "check that the engine has this very model, its weights and its precision; that it draws with"
            cure += " objective.temperature; that nothing drops out; try rollout=huggingface, precision=fp32"
            faults.append(Fault(what, cure))
        if ratio.exceeds(self.reading):
            what = f"the importance ratio of the first minibatch is not 1: {_said(ratio, self.reading)} between two"
            what += " readings of the same policy"
            cure = "something is drawn anew in each pass: set adapter.dropout=0, and the model's own dropout to 0"
            faults.append(Fault(what, cure))
        if kl.exceeds(self.reading):
            what = f"the KL to the reference is not 0 before the first update: {_said(kl, self.reading)} between the"
            what += " policy and what it began as"
            cure = "set objective.beta=0, or an adapter that begins as nothing; check what the run starts from"
            faults.append(Fault(what, cure))
        if faults:
            raise Disagreement(*faults)


def _said(apart: Apart, bounds: tuple[float, float]) -> str:
    return (
        f"{apart.mean:.2g} nats in the mean and {apart.largest:.2g} at most"
        f" (bounds {bounds[0]:g} and {bounds[1]:g}, over {apart.count:.0f} tokens)"
    )
