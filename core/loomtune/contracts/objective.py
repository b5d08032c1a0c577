"""What is learned, and how its loss is counted.

The loss is a sum and a weight, never a mean: the loop divides once by the weight of the whole optimizer step, over all
micro-batches and ranks, so that a mean of means cannot happen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loomtune.contracts.batch import NO_PARENT, Batch, Drawn, Sample, Step
from loomtune.contracts.data import Row
from loomtune.contracts.loss import Loss
from loomtune.contracts.model import Head, Model, Tokenizer
from loomtune.contracts.record import Record
from loomtune.contracts.reward import Reward
from loomtune.contracts.role import Role
from loomtune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.run import Run
    from loomtune.world import World

UNCUT = 1 << 30
"""A `max_length` that no row reaches."""

Roles = Mapping[str, Role]
Totals = Mapping[str, float]
"""Term name to the weight of the whole step, over all micro-batches and data replicas."""


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """A role that an objective needs.

    trained: whether it has an optimizer. head: `lm` or the name of a scalar head.
    twin_of: the role whose base it starts from and, where an adapter makes it possible, shares an engine with.
        A frozen twin with head `lm` is that engine with the adapter off; without an adapter, an engine of its own.
    shares: whether it is a view of its twin's engine whatever the adapter is, as a value head on the policy may be.
    """

    trained: bool
    head: Head = "lm"
    twin_of: str | None = None
    shares: bool = False


@dataclass(frozen=True, slots=True)
class LossSums:
    """What `Objective.loss` gives for a micro-batch.

    terms: term name to a scalar tensor with gradient, *summed* over the micro-batch (a mixture weight multiplied in).
    metrics: name to (sum, weight) as plain tensors without gradient; the mean over the step is logged.
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(ABC):
    """What is learned from rows. Importing it must not import torch: `sample` runs in the launching process."""

    def use(self, losses: Mapping[str, Loss], rewards: Mapping[str, Reward]) -> None:
        """Hands over the chosen losses and rewards, before all else. Raises UserError for what it does not take."""
        if losses:
            what = f"the objective takes no loss, but {', '.join(losses)} is chosen"
            raise UserError.of(what, "set loss=[], or choose an objective that takes one")

    def takes_rewards(self) -> bool:
        """Whether it learns from what rewards say; one that does not is handed those that an evaluator measures by."""
        return False

    def roles(self) -> Mapping[str, RoleSpec]:
        """The networks that take part; only a trained policy unless said otherwise."""
        return {"policy": RoleSpec(trained=True)}

    def suits(self, models: Mapping[str, Model]) -> None:
        """Raises UserError where a role's own model cannot take part; without torch, before any process exists."""
        return

    def records(self) -> Mapping[str, Record]:
        """Columns of the rows' samples that frozen roles fill, by name, read once before the first step and kept.

        A batch whose `columns` has such a name needs no reading; without it the role is there to be read.
        """
        return {}

    def terms(self) -> Mapping[str, str]:
        """Term name to the role whose engine its gradient goes to."""
        return {"loss": "policy"}

    def parts(self) -> Sequence[str]:
        """What each segment of a sample is, in a word for those who look at it; nothing where there is only one."""
        return ()

    @abstractmethod
    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """Token segments of a row, cut to `max_length` tokens along each chain of segments.

        Raises ValueError, in words for the user, where the row cannot be learned from.
        """

    def samples(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sequence[Sample]:
        """All samples of a row, in order: one, cut where it is too long, unless an objective goes on where it cut."""
        return [self.sample(row, tokenizer, max_length)]

    def prompt(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """Tokens from which a completion of the row is generated: exactly those that stand before its first target.

        Raises ValueError where the row has no target. An objective whose rows may lack an answer overrides it.
        """
        sample = self.sample(row, tokenizer, UNCUT)
        segment = next((segment for segment in sample.segments if segment.is_target.any()), None)
        if segment is None:
            raise ValueError("has no target, so nothing says where its prompt ends")
        tokens = [int(token) for token in segment.tokens[: int(segment.is_target.argmax())]]
        while segment.parent != NO_PARENT:
            segment = sample.segments[segment.parent]
            tokens = [*map(int, segment.tokens), *tokens]
        return tokens

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the settings and version of `sample`; part of the key under which samples are cached."""

    def experience(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        """The samples of each optimizer step that comes of `batch.size` rows; the same on every rank.

        An offline objective gives one step of the rows' own samples. An online one rolls out, scores, and gives all the
        minibatches of its inner epochs, with what they need in `Segment.columns`; they are fixed before the first is
        trained on, and a checkpoint keeps those that are left. Where samples are computed is the loop's affair.

        Called between two steps, with `run.step` done. `run.noted` takes what is to be logged with the next one, and
        `run.draw()` gives the rows of another `batch.size`. Where it raises, nothing was drawn.
        """
        return [self.together([one.sample for one in drawn], run.max_length)]

    def imagined(self, sample: Sample, max_length: int) -> Sequence[Sample]:
        """What `experience` could make of one row's sample at the longest, so that a step can be rehearsed.

        Nothing is rolled out: tokens and columns may hold anything. An offline objective's is the sample, as here.
        """
        return [sample]

    def together(self, samples: Sequence[Sample], max_length: int) -> Sequence[Sample]:
        """Samples that are counted together, those of a step or of a held-out split, each with what it needs of others.

        As many as were given, in their order; each chain of segments is cut to `max_length` tokens.
        """
        return samples

    def online(self) -> bool:
        """Whether `experience` makes samples of its own, so that nobody knows before the run what a step holds."""
        return type(self).experience is not Objective.experience

    def keeps_rows(self) -> bool:
        """Whether `experience` looks at rows, which are then kept beside their samples: `Drawn.given`."""
        return False

    def state(self) -> Mapping[str, Any]:
        """What changes from batch to batch and a checkpoint keeps, as JSON holds it: a coefficient that adapts."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave; from nothing, as at the beginning."""
        return

    def steps_per_batch(self) -> int:
        """How many optimizer steps `experience` usually gives: what `epochs` is planned with."""
        return 1

    def needs_targets(self) -> bool:
        """False where rows are prompts alone, so that a sample without a target is not a mistake."""
        return True

    def is_likelihood(self) -> bool:
        """Whether the terms are the targets' negative log-likelihood, of whose mean the exponential is a perplexity."""
        return False

    @abstractmethod
    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Weight of each term in a micro-batch (targets, pairs, sequences). Pure: reads no model."""

    def statistics(self, roles: Roles, step: Step, world: World) -> Mapping[str, Any]:
        """Quantities of the whole step that the loss needs (KTO's z0, an order, a whitening), called under `no_grad`.

        world: offers sums and gathers over data replicas; called once a step on every rank.
        """
        return {}

    @abstractmethod
    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """Sums of the terms over a micro-batch.

        One without samples gives every term, as zeros that still reach the trained parameters, and every metric.
        """
