"""GRPO and its family: completions of a prompt are compared with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Batch, Drawn
from loomtune_plugins.objectives.encoding import refuse
from loomtune_plugins.objectives.online import credit, telling
from loomtune_plugins.objectives.online.credit import Rewards
from loomtune_plugins.objectives.online.credited import Batched, Columns, Credited
from loomtune_plugins.objectives.online.experience import mean
from loomtune_plugins.objectives.online.groups import Group
from loomtune_plugins.objectives.online.grpo_settings import SOFT, GrpoSettings, faults
from loomtune_plugins.objectives.references import NAME

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.run import Run
    from loomtune_plugins.objectives.online.watching import Metrics

BY_TOKEN = ("bnpo", "dapo", "cispo", "vespo")
"""The variants whose loss is a mean over tokens; of the others it is one over completions."""


class Grpo(Credited):
    """Shao et al. 2024, "DeepSeekMath", equation 3, and what followed it.

    What a token's loss is divided by, over the whole step: `grpo`, `gspo` and `sapo` the completion's tokens, and then
    the completions; `bnpo`, `dapo`, `cispo` and `vespo` all tokens; `dr_grpo` completions times `max_new_tokens`.
    Completions that were scored count, also those without tokens or masked; those that are lost do not.
    """

    settings: GrpoSettings

    def __init__(self, settings: GrpoSettings) -> None:
        refuse(list(faults(settings)))
        super().__init__(settings)
        self.beta = settings.beta

    def gathered(self, run: Run, drawn: Sequence[Drawn]) -> list[Group]:
        """With `dynamic` above 1, other prompts in the place of those whose completions are all worth the same (Yu et
        al. 2025, "DAPO", section 3.2): fewer than asked for where the bound is met, never none.

        Raises NoSpread where no prompt of any batch tells its completions apart.
        """
        groups = super().gathered(run, drawn)
        if self.settings.draws == 1:
            return groups
        draws = 1
        while sum(not group.equal for group in groups) < len(drawn) and draws < self.settings.draws:
            groups += super().gathered(run, run.draw())
            draws += 1
        run.noted |= {"prompts/drawn": float(len(groups)), "groups/equal": sum(g.equal for g in groups) / len(groups)}
        found = [group for group in groups if not group.equal][: len(drawn)]
        if not found and any(group.kept for group in groups):
            raise telling.NoSpread.of(
                f"{draws} batches of prompts one after the other have no group whose completions differ in reward",
                "choose prompts that are neither too easy nor too hard for the policy, a reward that tells answers "
                "apart, or a larger objective.group; and begin another run with model.path=<this run>",
            )
        return found or groups

    def credit(self, batch: Batched) -> Columns:
        """Rewards less their group's mean, scaled."""
        return {"advantage": [each.tolist() for each in self.advantages([one.rewards for one in batch.groups])]}

    def advantages(self, rewards: Sequence[Rewards]) -> list[Rewards]:
        """Of the rewards `(completions,)` of each group."""
        return credit.grouped(rewards, self.settings.divisor)

    def idles(self, advantage: Any) -> bool:
        """Without a KL, what is neither better nor worse than its group has no gradient."""
        return not self.beta and advantage == 0

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Tokens, completions, or completions times the longest that one may be."""
        counted = "tokens" if self.settings.variant in BY_TOKEN else "sequences"
        weight = float(batch.columns[counted].sum()) if counted in batch.columns else 0.0
        return {"policy": weight * (self.settings.max_new_tokens if self.settings.variant == "dr_grpo" else 1)}

    def learned(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        from loomtune.toolkit import kl_estimates
        from loomtune_plugins.objectives.online import surrogates

        if "advantage" not in batch.columns:  # of rows that are prompts alone
            return log_probs.sum(), log_probs, {}
        old, advantage = self.old(log_probs, batch), batch.columns["advantage"]
        values, ratio = surrogates.policy(self.settings, log_probs, old, batch)
        metrics = {"ratio/mean": mean(ratio)}
        if self.settings.variant not in SOFT:
            metrics |= surrogates.clip_shares(ratio, advantage, *self.settings.clip)
        if self.beta:
            away = kl_estimates(log_probs, batch.columns[NAME], self.settings.kl)
            metrics["kl"] = mean(away)
            values = values + self.beta * (away * (log_probs - old).exp() if self.settings.kl_correction else away)
        if self.settings.variant not in BY_TOKEN and self.settings.variant != "dr_grpo":
            values = values / surrogates.lengths(batch)
        return values.sum(), ratio, metrics
