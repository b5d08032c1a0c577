"""Experience whose completions are credited each by itself: what roles say of them, and the steps that come of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loomtune.contracts import Batch, Drawn, LossSums, Sample
from loomtune.contracts.objective import Roles, Totals
from loomtune_plugins.objectives.online import groups as made
from loomtune_plugins.objectives.online import imagined, telling
from loomtune_plugins.objectives.online.ahead import Turn
from loomtune_plugins.objectives.online.experience import Online, Prepared, mean
from loomtune_plugins.objectives.online.groups import Group
from loomtune_plugins.objectives.online.invariants import LATER

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.run import Run
    from loomtune_plugins.objectives.online.watching import Metrics, Watch

Columns = Mapping[str, Sequence[Sequence[Any]]]
"""By name, for each group, of each completion that is kept: a number, or `(tokens,)`."""


@dataclass(frozen=True, slots=True)
class Batched:
    """A batch of completions, of which steps are made. columns: what roles said of them."""

    groups: Sequence[Group]
    columns: Columns


class Credited(Online):
    """Learns from each completion by what it is credited with.

    Beside the columns of its kind a sample has `old` (the policy's log-probabilities before the batch's first step, or
    with `rollout.ahead` those that it was drawn with; absent where there is one step only, which has them itself),
    `reference` (where `beta` is not 0), and those that `credit` gives.

    Those who inherit say in `credit` what completions are worth, in `weights` what the loss is divided by, and in
    `learned` what is minimised. They may add roles, columns that roles fill, and numbers.
    """

    def batch(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        """The steps that come of the completions of these prompts."""
        groups = self.gathered(run, drawn)
        if not any(group.kept for group in groups):
            self.signs.nothing_scored(run)
            return []
        batch = self.read(run, groups)
        credit = self.credit(batch)
        telling.tell(run, groups, credit["advantage"])
        self.signs.look(run, groups)
        steps = self.steps(run, groups, self.prepared(batch, credit))
        self.signs.learned(run, bool(steps))
        return steps

    def reads(self) -> bool:
        """Whether roles are asked anything before the first step."""
        return (self.reads_old() and not self.turn) or self.beta != 0

    def reads_old(self) -> bool:
        """Whether the policy's log-probabilities are needed before the first step, which could tell them itself."""
        return self.steps_per_batch() > 1

    def said(self, roles: Roles, batch: Batch) -> dict[str, Tensor]:
        """What roles say of a batch's targets before anything is learned, `(targets,)` by the names of the columns."""
        found: dict[str, Tensor] = {}
        if self.reads_old() and not self.turn:
            found["old"] = self._old(roles, batch)
        if self.beta:
            found["reference"] = self._reference(roles, batch)
        return found

    def _old(self, roles: Roles, batch: Batch) -> Tensor:
        from loomtune.toolkit import log_probs

        policy = roles["policy"]
        with policy.engine.evaluating():
            return log_probs(policy, batch, temperature=self.settings.temperature)

    def read(self, run: Run, groups: Sequence[Group]) -> Batched:
        """What roles say of the groups' completions, each read once."""
        import torch

        columns: dict[str, list[list[Any]]] = {}
        names: list[str] = []

        def reader(roles: Roles, batch: Batch) -> Tensor:
            said = self.said(roles, batch)
            names[:] = said
            return torch.stack(list(said.values()), 1)

        if self.reads():
            with telling.timed(run, "read_seconds"):
                found = run.read([self._laid(group, {}) for group in groups], reader)
            each = [made.apart(group, values) for group, values in zip(groups, found, strict=True)]
            columns = {name: [[one[:, i] for one in part] for part in each] for i, name in enumerate(names)}
        if all(len(one.log_probs) == len(one.answer.tokens) for group in groups for one in group.kept):
            columns["rollout"] = [[np.array(one.log_probs) for one in group.kept] for group in groups]
        if self.turn:
            columns["old"] = Turn.old(columns)
        return Batched(groups, columns)

    def _laid(self, group: Group, columns: Mapping[str, Sequence[Any]], which: Sequence[bool] | None = None) -> Sample:
        learned = [True] * len(group.kept) if which is None else which
        return made.laid(group, learned, shared=self.settings.group > 1, columns=columns)

    def columns(self) -> list[str]:
        """Names of what its samples have for every target."""
        old = ["old"] if self.reads_old() else []
        return [*old, *(["reference"] if self.beta else []), "rollout", "advantage"]

    def imagined(self, sample: Sample, max_length: int) -> Sequence[Sample]:
        """The prompt with all its completions, each as long as it may be."""
        how, prompt = self.settings, sample.segments[0]
        shared = how.group > 1
        return [imagined.group(prompt, how.group, how.max_new_tokens, max_length, self.columns(), shared=shared)]

    def idles(self, advantage: Any) -> bool:
        """Whether a completion with this advantage has no gradient, so that nobody need compute it."""
        return False

    @abstractmethod
    def credit(self, batch: Batched) -> Columns:
        """What completions are credited with: `advantage`, and what else the loss needs of their tokens."""

    def prepared(self, batch: Batched, credit: Columns) -> list[Prepared]:
        """The groups as samples, with all columns and numbers."""
        found = []
        for i, group in enumerate(batch.groups):
            columns = {name: values[i] for name, values in {**batch.columns, **credit}.items()}
            counted = [self.counts(one) for one in group.kept]
            moves = [c and not self.idles(a) for c, a in zip(counted, columns["advantage"], strict=True)]
            tokens = sum(len(one.answer.tokens) for one, counts in zip(group.kept, counted, strict=True) if counts)
            numbers = {"sequences": float(len(group.kept)), "tokens": float(tokens), "first": LATER}
            laid = [replace(self._laid(group, columns, which), numbers=numbers) for which in (counted, moves)]
            found.append(Prepared(*laid))
        return found

    # Loss

    def terms(self) -> Mapping[str, str]:
        return {"policy": "policy"}

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """What `learned` makes of the policy's log-probabilities of the targets."""
        from loomtune.toolkit import entropy, observed

        found, entropies = observed(roles["policy"], batch, [entropy], temperature=self.settings.temperature)
        value, ratio, metrics = self.learned(found, batch)
        metrics |= {"entropy": mean(entropies)}
        watch: Watch = statistics["watch"]
        metrics |= watch.see(found.detach(), ratio.detach(), batch)
        return LossSums({"policy": value}, metrics)

    @abstractmethod
    def learned(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """What is minimised, summed over the targets `(targets,)` of a micro-batch; the importance ratio `(targets,)`;
        and what is logged. log_probs: of the policy, with gradient."""

    def old(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """`(targets,)`: the log-probabilities before the batch's first step."""
        return batch.columns.get("old", log_probs.detach())
