"""Knowledge distillation: the policy learns what another model says of every next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Batch, Drawn, LossSums, Model, Objective, Record, RoleSpec, Row, Sample, Tokenizer, View
from loomtune.contracts.objective import Roles, Totals
from loomtune.errors import Fault
from loomtune_plugins.objectives import distill_on_policy, distill_top_k
from loomtune_plugins.objectives.distill_settings import DistillSettings
from loomtune_plugins.objectives.encoding import refuse
from loomtune_plugins.objectives.sft import Sft
from loomtune_plugins.objectives.sft_settings import SftSettings

if TYPE_CHECKING:
    from loomtune.run import Run


class Distill(Objective):
    """Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD).

    Rows and targets are those of `objective=sft`; instead of the one right token, the teacher's whole distribution is
    learned, as a mean over targets. Of a share of the visits, `on_policy`, the policy itself writes the answer.
    """

    def __init__(self, settings: DistillSettings) -> None:
        self.settings = settings
        self.rows = Sft(SftSettings(**{field.name: getattr(settings, field.name) for field in fields(SftSettings)}))
        _check(settings)
        self.on_policy = distill_on_policy.OnPolicy(settings) if settings.on_policy else None

    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, and a model of its own that teaches it."""
        return {"policy": RoleSpec(trained=True), "teacher": RoleSpec(trained=False)}

    def suits(self, models: Mapping[str, Model]) -> None:
        """What is stored of a teacher is of no more tokens than it has."""
        if self.settings.teacher_logits == "stored":
            refuse(distill_top_k.too_many(self.settings.top_k, models[distill_top_k.NAME].vocabulary()))

    def records(self) -> Mapping[str, Record]:
        """What the teacher says of the rows' own answers, unless it is read in each step."""
        return distill_top_k.records(self.settings)

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """As supervised fine-tuning has it."""
        sample = self.rows.sample(row, tokenizer, max_length)
        return self.on_policy.sample(sample, row, tokenizer) if self.on_policy else sample

    def prompt(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """As supervised fine-tuning has it."""
        return self.rows.prompt(row, tokenizer)

    def fingerprint(self) -> str:
        """That of supervised fine-tuning, whose samples these are, with the prompts' lengths where answers change."""
        return self.rows.fingerprint() + ("+prompt" if self.on_policy else "")

    def experience(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        """One step of the rows' own samples, some of them with answers that the policy writes now."""
        return super().experience(run, self.on_policy.drawn(run, drawn) if self.on_policy else drawn)

    def online(self) -> bool:
        """Only where the policy writes answers."""
        return self.on_policy is not None

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The number of target tokens."""
        return {"loss": float(len(batch.target))}

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """Divergences summed over the targets, in nats."""
        found = self._compared(roles, batch)
        values, seen = found[:, 0], found[:, 1:].detach()
        count = seen.new_tensor(float(len(seen)))
        metrics = {"kl": (seen[:, 0].sum(), count), "entropy": (seen[:, 1].sum(), count)}
        metrics |= distill_on_policy.metrics(batch)
        return LossSums({"loss": values.sum()}, metrics)

    def _compared(self, roles: Roles, batch: Batch) -> Any:
        """`(targets, 3)`: divergence, KL(teacher || policy), entropy."""
        import torch

        from loomtune_plugins.objectives.distill_divergence import compared, divergence, observed
        from loomtune_plugins.objectives.side_by_side import side_by_side

        policy, how = roles["policy"], {"beta": self.settings.beta, "temperature": self.settings.temperature}

        def beside(view: View, theirs: torch.Tensor, head: torch.nn.Module, compare: Any, look: Any) -> Any:
            compare = partial(compare, **how)
            values, seen = compared(view.states, view.heads[policy.head], theirs, head, compare, look)
            return torch.cat([values.unsqueeze(1), seen], 1)

        if (kept := batch.columns.get(distill_top_k.NAME)) is not None:
            told, look = distill_top_k.divergence_of, distill_top_k.observed_of
            return policy.read(batch, lambda view: beside(view, kept[view.index], torch.nn.Identity(), told, look))
        teacher = roles["teacher"]

        def reader(view: View, other: View) -> Any:
            return beside(view, other.states, other.heads[teacher.head], divergence, observed)

        return side_by_side(policy, teacher, batch, reader)


def _check(settings: DistillSettings) -> None:
    faults = [*distill_on_policy.faults(settings), *distill_top_k.faults(settings)]
    if not 0 <= settings.beta <= 1:
        faults.append(Fault(f"objective.beta={settings.beta} is no share", "set objective.beta between 0 and 1"))
    if settings.temperature <= 0:
        what = f"objective.temperature={settings.temperature} divides nothing"
        faults.append(Fault(what, "set objective.temperature above 0"))
    refuse(faults)
