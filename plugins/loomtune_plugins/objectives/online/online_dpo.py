"""Online DPO: what the policy itself writes is compared, by rewards, and learned from as pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loomtune.contracts import Batch, DistributionLoss, Drawn, Loss, LossSums, Reward, RoleSpec, Sample, Step
from loomtune.contracts.objective import Roles, Totals
from loomtune.errors import UserError
from loomtune_plugins.objectives import references
from loomtune_plugins.objectives.answers import PAIR
from loomtune_plugins.objectives.dpo import Dpo
from loomtune_plugins.objectives.encoding import refuse
from loomtune_plugins.objectives.online import groups as made
from loomtune_plugins.objectives.online import imagined, telling
from loomtune_plugins.objectives.online.experience import Online, Prepared, mean
from loomtune_plugins.objectives.online.groups import Group
from loomtune_plugins.objectives.online.invariants import LATER
from loomtune_plugins.objectives.online.online_dpo_settings import OnlineDpoSettings, faults

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.run import Run
    from loomtune.world import World


class Tempered(Dpo):
    """`objective=dpo` of log-probabilities of logits divided by the temperature that completions are drawn with.

    log_probs: `(targets,)`, of the micro-batch that was read last.
    """

    def __init__(self, settings: OnlineDpoSettings) -> None:
        super().__init__(settings.dpo)
        self.temperature = settings.temperature
        self.log_probs: Tensor | None = None

    def use(self, losses: Mapping[str, Loss], rewards: Mapping[str, Reward]) -> None:
        super().use(losses, rewards)
        if self.compares and self.temperature != 1.0:
            named = next(name for name, loss in losses.items() if isinstance(loss, DistributionLoss))
            what = f"loss={named} compares whole distributions, and objective.temperature={self.temperature:g} is of"
            raise UserError.of(f"{what} the tokens that are drawn", "set objective.temperature=1, or leave it out")

    @property
    def compares(self) -> bool:
        """Whether a loss asks for the reference's whole distributions, which nobody keeps."""
        return any(isinstance(loss, DistributionLoss) for loss in self.losses.values())

    def _read(self, roles: Roles, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor, dict[DistributionLoss, Tensor]]:
        if self.compares:
            found = super()._read(roles, batch)
        else:
            from loomtune.toolkit import entropy, observed

            looks = [entropy, *self.looks()]
            targets, *seen = observed(roles["policy"], batch, looks, temperature=self.temperature)
            found = targets, seen, references.said(roles, batch), {}
        self.log_probs = found[0].detach()
        return found


class OnlineDpo(Online):
    """Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", algorithm 1.

    Of the completions of a prompt, scored by the rewards, the best is preferred to the worst. Equal ones are no pair.
    """

    settings: OnlineDpoSettings

    def __init__(self, settings: OnlineDpoSettings) -> None:
        refuse(list(faults(settings)))
        super().__init__(settings)
        self.pairs = Tempered(settings)
        self.tied = 0

    def use(self, losses: Mapping[str, Loss], rewards: Mapping[str, Reward]) -> None:
        """Takes any number of rewards, by whose weighted sum completions are compared, and the losses of pairs."""
        super().use({}, rewards)
        self.pairs.use(losses, {})

    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, what it is compared with, and what rewards read."""
        return {**super().roles(), **self.pairs.roles()}

    def parts(self) -> Sequence[str]:
        return PAIR

    def terms(self) -> Mapping[str, str]:
        """One for each loss."""
        return self.pairs.terms()

    def batch(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        """The steps that come of the pairs. None where no completion is better than another of its prompt.

        Raises NoSpread where that goes on.
        """
        groups = self.gathered(run, drawn)
        if not any(group.kept for group in groups):
            self.signs.nothing_scored(run)
            return []
        found = [self.pair(group) for group in groups]
        pairs = [pair for pair in found if pair is not None]
        gaps = [pair.all[0].reward - pair.all[1].reward for pair in pairs]
        run.noted |= {"pairs/share": len(pairs) / len(groups), "pairs/margin": float(np.mean(gaps)) if gaps else 0.0}
        telling.tell(run, groups, [_sides(*both) for both in zip(groups, found, strict=True)])
        for name in [name for name in run.noted if name.startswith("advantages/")]:
            del run.noted[name]  # a pair has two sides, and no amounts
        self.signs.look(run, groups)
        if not pairs:
            self._nothing_to_prefer()
            return []
        self.tied = 0
        return self.steps(run, pairs, [Prepared(one, one) for one in self._samples(run, pairs)])

    def imagined(self, sample: Sample, max_length: int) -> Sequence[Sample]:
        """The prompt with a pair of completions, each as long as it may be."""
        columns = ["rollout"] if self.pairs.compares else ["rollout", references.NAME]
        longest = self.settings.max_new_tokens
        return [imagined.group(sample.segments[0], 2, longest, max_length, columns, shared=True)]

    def pair(self, group: Group) -> Group | None:
        """The best completion and the worst, the first of equals; None where they are worth the same."""
        some = [one for one in group.kept if self.counts(one) and one.answer.tokens]
        if not some:
            return None
        best, worst = max(some, key=lambda one: one.reward), min(some, key=lambda one: one.reward)
        return replace(group, all=[best, worst]) if best.reward - worst.reward > self.settings.margin else None

    def _nothing_to_prefer(self) -> None:
        self.tied += 1
        if self.tied >= telling.EMPTY_BATCHES:
            what = f"in {self.tied} batches one after the other no completion was better than another of its prompt"
            cure = "choose a reward that tells answers apart, prompts that are neither too easy nor too hard, a larger"
            raise telling.NoSpread.of(what, f"{cure} objective.group, or a smaller objective.margin")

    def _samples(self, run: Run, pairs: Sequence[Group]) -> list[Sample]:
        """The prompt and both completions, with what was drawn and what the reference says of them."""
        samples = [self._pair_sample(pair) for pair in pairs]
        if self.pairs.compares:
            return samples
        with telling.timed(run, "read_seconds"):
            found = run.read(samples, self._reference)
        both = zip(samples, found, strict=True)
        return [sample.with_column(references.NAME, values) for sample, values in both]

    def _pair_sample(self, pair: Group) -> Sample:
        said = all(len(one.log_probs) == len(one.answer.tokens) for one in pair.all)
        columns = {"rollout": [np.array(one.log_probs) for one in pair.all]} if said else {}
        sample = made.laid(pair, [True, True], shared=True, columns=columns)
        return replace(sample, numbers={"sequences": 2.0, "tokens": float(sample.targets), "first": LATER})

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """As `objective=dpo`: pairs, for most losses."""
        return self.pairs.weights(batch)

    def statistics(self, roles: Roles, step: Step, world: World) -> Mapping[str, Any]:
        return {**self.pairs.statistics(roles, step, world), **super().statistics(roles, step, world)}

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """As `objective=dpo`, with what is seen of the completions."""
        found = self.pairs.loss(roles, batch, totals, statistics)
        log_probs = self.pairs.log_probs
        assert log_probs is not None, "the loss has read the policy"
        seen = statistics["watch"].see(log_probs, log_probs[:0], batch)
        metrics = {name: value for name, value in seen.items() if not name.startswith("ratio/")}
        if references.NAME in batch.columns:
            metrics["kl"] = mean(log_probs - batch.columns[references.NAME])
        return replace(found, metrics={**found.metrics, **metrics})


def _sides(group: Group, pair: Group | None) -> list[float]:
    """Of each completion that is kept: 1 for the one preferred, -1 for the other, 0 for who is in no pair."""
    best, worst = (pair.all[0], pair.all[1]) if pair else (None, None)
    return [float(one is best) - float(one is worst) for one in group.kept]
