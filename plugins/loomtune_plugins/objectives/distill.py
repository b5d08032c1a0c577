"""Knowledge distillation: the policy learns what another model says of every next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from loomtune.contracts import Batch, LossSums, Objective, RoleSpec, Row, Sample, Tokenizer, View
from loomtune.contracts.objective import Roles, Totals
from loomtune.errors import Fault, UserError
from loomtune_plugins.objectives.distill_settings import DistillSettings
from loomtune_plugins.objectives.sft import Sft
from loomtune_plugins.objectives.sft_settings import SftSettings


class Distill(Objective):
    """Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), on the rows' own answers.

    Rows and targets are those of `objective=sft`; instead of the one right token, the teacher's whole distribution is
    learned, as a mean over targets. Answers that the policy wrote itself, the other half of that paper, are rollouts.
    """

    def __init__(self, settings: DistillSettings) -> None:
        self.settings = settings
        self.rows = Sft(SftSettings(**{field.name: getattr(settings, field.name) for field in fields(SftSettings)}))
        _check(settings)

    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, and a model of its own that teaches it."""
        return {"policy": RoleSpec(trained=True), "teacher": RoleSpec(trained=False)}

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """As supervised fine-tuning has it."""
        return self.rows.sample(row, tokenizer, max_length)

    def prompt(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """As supervised fine-tuning has it."""
        return self.rows.prompt(row, tokenizer)

    def fingerprint(self) -> str:
        """That of supervised fine-tuning, whose samples these are."""
        return self.rows.fingerprint()

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The number of target tokens."""
        return {"loss": float(len(batch.target))}

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """Divergences summed over the targets, in nats."""
        found = self._compared(roles, batch)
        values, seen = found[:, 0], found[:, 1:].detach()
        count = seen.new_tensor(float(len(seen)))
        metrics = {"kl": (seen[:, 0].sum(), count), "entropy": (seen[:, 1].sum(), count)}
        return LossSums({"loss": values.sum()}, metrics)

    def _compared(self, roles: Roles, batch: Batch) -> Any:
        """`(targets, 3)`: divergence, KL(teacher || policy), entropy.

        The teacher reads inside the policy's reading: that is where both have their heads' weights.
        """
        import torch

        from loomtune_plugins.objectives.distill_divergence import compared, divergence

        policy, teacher = roles["policy"], roles["teacher"]
        compare = partial(divergence, beta=self.settings.beta, temperature=self.settings.temperature)

        def reader(view: View) -> Any:
            learns, made = torch.is_grad_enabled(), []

            def beside(other: View) -> Any:
                with torch.set_grad_enabled(learns):
                    heads = view.heads[policy.head], other.heads[teacher.head]
                    values, seen = compared(view.states, heads[0], other.states, heads[1], compare)
                    made.append(torch.cat([values.unsqueeze(1), seen], 1))
                return seen

            teacher.read(batch, beside)
            return made[0]

        return policy.read(batch, reader)


def _check(settings: DistillSettings) -> None:
    faults = []
    if not 0 <= settings.beta <= 1:
        faults.append(Fault(f"objective.beta={settings.beta} is no share", "set objective.beta between 0 and 1"))
    if settings.temperature <= 0:
        what = f"objective.temperature={settings.temperature} divides nothing"
        faults.append(Fault(what, "set objective.temperature above 0"))
    if faults:
        raise UserError(*faults)
