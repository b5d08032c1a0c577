"""Supervised fine-tuning: the log-probability of answers, conversations or plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from loomtune.contracts import Batch, DistributionLoss, Loss, LossSums, Objective, Reward, RoleSpec, Row, Sample
from loomtune.contracts.model import Tokenizer
from loomtune.contracts.objective import Roles, Totals
from loomtune.errors import Fault, UserError
from loomtune_plugins.objectives import references
from loomtune_plugins.objectives.encoding import BOS, answered, begin, prompt, refuse, unknown
from loomtune_plugins.objectives.sft_settings import SftSettings

VERSION = 4
"""Part of the fingerprint: raise it when the same row gives other tokens."""


class Sft(Objective):
    """Cross-entropy of the target tokens, divided once by their number in the whole step.

    A loss that compares distributions with those of the model that training began with may be added, against
    forgetting: `loss=[kl]`, at the same tokens.
    """

    def __init__(self, settings: SftSettings) -> None:
        _check(settings)
        self.settings = settings
        self.losses: Mapping[str, DistributionLoss] = {}

    def use(self, losses: Mapping[str, Loss], rewards: Mapping[str, Reward]) -> None:
        """Takes losses of distributions, and none of answers."""
        super().use({}, rewards)
        if others := [name for name, loss in losses.items() if not isinstance(loss, DistributionLoss)]:
            what = f"objective=sft takes losses of whole distributions, such as kl, and {others[0]} is of answers"
            raise UserError.of(what, f"leave {others[0]} out, or choose an objective of pairs, such as dpo")
        self.losses = {name: loss for name, loss in losses.items() if isinstance(loss, DistributionLoss)}

    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, and what it began as where a loss asks for it."""
        return references.roles() if self.losses else super().roles()

    def terms(self) -> Mapping[str, str]:
        """The likelihood, and each added loss."""
        return dict.fromkeys(("loss", *self.losses), "policy")

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """One segment: what is given, what is learned, and the end token, which is learned unless it is cut off.

        A label of 0 that no format made one of wanted answers may be a class, and rides along.
        """
        if row.get("label") is False:
            raise ValueError("is an unwanted answer; objective=kto learns from it, or leave such rows out")
        settings = self.settings
        last_only = settings.turns == "last"
        encoded = answered(row, tokenizer, separator=settings.separator, last_only=last_only, system=settings.system)
        begin(encoded, row, tokenizer, self.settings.bos)
        if self.settings.train_on == "all":
            encoded.learned = [True] * len(encoded.ids)
        return Sample((encoded.segment(max_length),))

    def prompt(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """The tokens that a model trained so is asked with: `sample` of the same row begins with them."""
        settings = self.settings
        return prompt(row, tokenizer, separator=settings.separator, bos=settings.bos, system=settings.system)

    def fingerprint(self) -> str:
        """Digest of the settings and of the version of `sample`."""
        content = json.dumps(["sft", VERSION, asdict(self.settings)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def is_likelihood(self) -> bool:
        """Unless a loss is added to it."""
        return not self.losses

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The number of target tokens."""
        return dict.fromkeys(self.terms(), float(len(batch.target)))

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """The summed negative log-probability of the targets, in nats, and what each added loss says of them."""
        from loomtune.toolkit import log_probs

        if not self.losses:
            return LossSums({"loss": -log_probs(roles["policy"], batch).sum()})
        from loomtune_plugins.objectives.side_by_side import observed_beside

        policy, reference = roles["policy"], roles[references.NAME]
        distances = [loss.distance for loss in self.losses.values()]
        (targets,), _, apart = observed_beside(policy, reference, batch, [], distances)
        found = {name: values.sum() for name, values in zip(self.losses, apart, strict=True)}
        count = targets.new_tensor(float(len(targets)))
        terms = {name: self.losses[name].weight * value for name, value in found.items()}
        metrics = {name: (value.detach(), count) for name, value in found.items()}
        return LossSums({"loss": -targets.sum(), **terms}, metrics)


def _check(settings: SftSettings) -> None:
    """Raises UserError for values that are none, and for a choice of turns that would have no effect."""
    faults = unknown(settings, train_on=("completion", "all"), turns=("all", "last"), bos=BOS)
    if settings.train_on == "all" and settings.turns == "last":
        faults.append(
            Fault(
                "objective.turns=last has no effect with objective.train_on=all, which learns every token",
                "leave one of them out",
            )
        )
    refuse(faults)
