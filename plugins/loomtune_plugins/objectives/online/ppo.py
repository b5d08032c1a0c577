"""PPO: a value function says what was to be expected, and tokens are credited with what came instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Batch, Drawn, LossSums, RoleSpec, Sample
from loomtune.contracts.objective import Roles, Totals
from loomtune_plugins.objectives.encoding import refuse
from loomtune_plugins.objectives.online.credited import Batched, Columns, Credited
from loomtune_plugins.objectives.online.experience import mean
from loomtune_plugins.objectives.online.groups import Group, Scored
from loomtune_plugins.objectives.online.ppo_credit import adapted, credited, foretold, token_rewards
from loomtune_plugins.objectives.online.ppo_settings import VALUE, PpoSettings, faults
from loomtune_plugins.objectives.references import NAME

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.run import Run
    from loomtune_plugins.objectives.online.watching import Metrics, Watch

Numbers = NDArray[np.float64]

CREDIT = ("advantage", "returns")
"""The columns that are made of what roles say."""


class Ppo(Credited):
    """Schulman et al. 2017, "PPO", as Ziegler et al. 2019 and Ouyang et al. 2022 train language models with it.

    Tokens are actions. The reward of each is what its KL to the reference costs, and the score comes with the last one;
    advantages are generalised ones (GAE). Losses are means over all tokens of a step. A value head that was never
    trained begins at 0, so that advantages begin as rewards to go: drawn, it added noise of their own size to them, and
    the same run gained half as much in its first 25 batches.

    Beside the columns of its kind a sample has `value`, as it was before the batch's first step, and `returns`.
    coefficient: what each nat of KL costs now; where it adapts, a checkpoint keeps it.
    """

    settings: PpoSettings

    def __init__(self, settings: PpoSettings) -> None:
        refuse(list(faults(settings)))
        super().__init__(settings)
        self.beta = self.coefficient = self._next = settings.beta

    def roles(self) -> Mapping[str, RoleSpec]:
        """Those of its kind, and the value: a head of the policy's network, or a network that starts from its base."""
        head = RoleSpec(trained=True, head=f"_{VALUE}", twin_of="policy", shares=self.settings.value == "head")
        return {**super().roles(), VALUE: head}

    def terms(self) -> Mapping[str, str]:
        """The value's gradient goes to its own network, where it has one."""
        return {"policy": "policy", VALUE: VALUE}

    def reads(self) -> bool:
        """Always: values are needed before the first step, and the policy is read in the same pass."""
        return True

    def columns(self) -> list[str]:
        return ["old", VALUE, *(["reference"] if self.beta else []), "rollout", *CREDIT]

    def said(self, roles: Roles, batch: Batch) -> dict[str, Tensor]:
        from loomtune_plugins.objectives.online.ppo_reading import said

        with roles["policy"].engine.evaluating(), roles[VALUE].engine.evaluating():
            found = said(roles, batch, self.settings.temperature)
        columns = {"old": found.log_probs, VALUE: found.values}
        return columns | ({NAME: self._reference(roles, batch)} if self.beta else {})

    def experience(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        """As its kind makes it. The coefficient is changed last of all, so that nothing is where this raises."""
        self._next = self.coefficient
        steps = super().experience(run, drawn)
        self.coefficient = self._next
        return steps

    # Credit

    def read(self, run: Run, groups: Sequence[Group]) -> Batched:
        """Adds `advantage` and `returns`, made of all tokens of the batch together; zeros where nothing is learned."""
        batch, how = super().read(run, groups), self.settings
        chosen = [(i, k) for i, group in enumerate(groups) for k, one in enumerate(group.kept) if self.counts(one)]
        said = {name: [table[i][k].astype(np.float64) for i, k in chosen] for name, table in batch.columns.items()}
        kl = self.kl_of(said)
        rewards = [self.rewards_of(groups[i].kept[k], each) for (i, k), each in zip(chosen, kl, strict=True)]
        made = credited(
            rewards, said[VALUE], gamma=how.gamma, lam=how.lam, whitens=how.whiten, whitens_rewards=how.whiten_rewards
        )
        run.noted |= foretold(said[VALUE], made[1])
        self._adapt(run, [float(each.sum()) for each in kl])
        columns = {
            name: _placed(groups, dict(zip(chosen, values, strict=True)))
            for name, values in zip(CREDIT, made, strict=True)
        }
        return replace(batch, columns={**batch.columns, **columns})

    def kl_of(self, said: Mapping[str, Sequence[Numbers]]) -> list[Numbers]:
        """Estimates in nats, `(tokens,)`, of the KL to the reference of each completion; zeros without one."""
        import torch

        from loomtune.toolkit import kl_estimates

        if not self.beta:
            return [np.zeros_like(each) for each in said["old"]]
        old, reference = (map(torch.from_numpy, said[name]) for name in ("old", NAME))
        return [kl_estimates(a, b, self.settings.kl).numpy() for a, b in zip(old, reference, strict=True)]

    def rewards_of(self, one: Scored, kl: Numbers) -> Numbers:
        """`(tokens,)` of a completion, at what the KL costs now."""
        return token_rewards(one.reward, one.answer.ended, kl, self.coefficient, self.settings.missing_eos_penalty)

    def credit(self, batch: Batched) -> Columns:
        """What `read` made, which sees the run."""
        return {name: batch.columns[name] for name in CREDIT}

    def _adapt(self, run: Run, kls: Sequence[float]) -> None:
        """Notes what the KL costs and is, and what it will cost next. kls: of whole completions, in nats."""
        if not self.beta or not kls:
            return
        kl = float(np.mean(kls))
        run.noted |= {"kl/coefficient": self.coefficient, "kl/completion": kl}
        if self.settings.kl_target:
            self._next = adapted(self.coefficient, kl, self.settings.kl_target, self.settings.kl_gain)

    # Loss

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Tokens."""
        return dict.fromkeys(self.terms(), float(len(batch.target)))

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        from loomtune_plugins.objectives.online.ppo_reading import said, value_losses

        how = self.settings
        found = said(roles, batch, how.temperature, bonus=how.entropy > 0)
        value, ratio, metrics = self.learned(found.log_probs, batch)
        if how.entropy:
            value = value - how.entropy * found.bonus.sum()
        old, returns = (batch.columns.get(name, found.values.detach()) for name in (VALUE, "returns"))
        errors, held = value_losses(found.values, old, returns, how.value_clip)
        metrics |= {
            "entropy": mean(found.entropies),
            "value/mean": mean(found.values),
            "value/clipped": mean(held.float()),
        }
        watch: Watch = statistics["watch"]
        metrics |= watch.see(found.log_probs.detach(), ratio.detach(), batch)
        return LossSums({"policy": value, VALUE: how.value_coef * errors.sum()}, metrics)

    def learned(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        from loomtune.toolkit import kl_estimates
        from loomtune_plugins.objectives.online.surrogates import clip_shares, clipped

        if "advantage" not in batch.columns:  # of rows that are prompts alone
            return log_probs.sum(), log_probs, {}
        advantage, (low, high) = batch.columns["advantage"], self.settings.clip
        values, ratio = clipped(log_probs - self.old(log_probs, batch), advantage, low, high)
        metrics = {"ratio/mean": mean(ratio), **clip_shares(ratio, advantage, low, high)}
        if self.beta:
            metrics["kl"] = mean(kl_estimates(log_probs.detach(), batch.columns[NAME], self.settings.kl))
        return values.sum(), ratio, metrics

    # What a checkpoint keeps

    def state(self) -> Mapping[str, Any]:
        return {**super().state(), "coefficient": self.coefficient}

    def resume(self, state: Mapping[str, Any]) -> None:
        super().resume(state)
        self.coefficient = float(state.get("coefficient", self.beta))


def _placed(groups: Sequence[Group], values: Mapping[tuple[int, int], Numbers]) -> list[list[Numbers]]:
    """A column of what is known of some completions, by their places."""
    return [
        [values.get((i, k), np.zeros(len(one.answer.tokens))) for k, one in enumerate(group.kept)]
        for i, group in enumerate(groups)
    ]
