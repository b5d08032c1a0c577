"""Direct preference optimisation and its family: pairs of answers, compared with a frozen reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Batch, DistributionLoss, Loss, Record, Reward, RoleSpec
from loomtune.errors import Fault, UserError
from loomtune_plugins.objectives import references
from loomtune_plugins.objectives.answers import CHOSEN, REJECTED
from loomtune_plugins.objectives.dpo_settings import DIVERGENCES, DpoSettings
from loomtune_plugins.objectives.encoding import refuse, unknown
from loomtune_plugins.objectives.pairs import Pairwise

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.toolkit.log_probs import Look


class Dpo(Pairwise):
    """Rafailov et al. 2023, "Direct Preference Optimization"; the loss is `sigmoid` where none is chosen."""

    refers = True
    settings: DpoSettings

    def __init__(self, settings: DpoSettings) -> None:
        super().__init__(settings)
        _check(settings)

    def use(self, losses: Mapping[str, Loss], rewards: Mapping[str, Reward]) -> None:
        """Also refuses to store what a loss needs alive, and to divide by tokens that count less than one."""
        super().use(losses, rewards)
        means = [name for name, loss in losses.items() if loss.by_means]
        if means and self.settings.tail != 1.0:
            what = f"loss={means[0]} is of means over tokens, and objective.tail={self.settings.tail} of sums"
            raise UserError.of(what, "leave objective.tail out, or choose a loss of sums, such as sigmoid")
        alive = [name for name, loss in losses.items() if isinstance(loss, DistributionLoss)]
        if alive and self.settings.reference == "stored":
            what = f"loss={alive[0]} compares whole distributions, of which objective.reference=stored keeps one number"
            raise UserError.of(what, "set objective.reference=live, or leave it out")

    def read(self) -> dict[str, bool]:
        """A loss of means of the policy alone reads no reference, say, which then would serve metrics only."""
        chosen = self.losses.values()
        referred = any(loss.needs_reference or loss.by_preference for loss in chosen)
        found = super().read()
        return found | {
            "divergence": any(loss.by_preference for loss in chosen),
            "reference": referred,
            "tail": found["beta"],
            "weighting": not all(isinstance(loss, DistributionLoss) for loss in chosen),
        }

    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, and what it is compared with."""
        return references.roles()

    def records(self) -> Mapping[str, Record]:
        """What the reference says of every answer, unless it is read in each step."""
        alive = any(isinstance(loss, DistributionLoss) for loss in self.losses.values())
        return references.records("live" if alive else self.settings.reference)

    def preference(self, log_ratio: Tensor) -> Tensor:
        """Wang et al. 2023, "Beyond Reverse KL", table 2: f' of the divergence at policy / reference.

        The order of the alpha divergence is TRL's, 1 - alpha of that paper: 1 is reverse and 0 forward KL, whose f'
        has a constant more than the paper's, which differences cancel. Beyond e^80 fp32 has no numbers, and no answer
        is that much likelier.
        """
        import torch
        from torch.nn import functional as F

        kind, alpha = self.settings.divergence, self.settings.divergence_alpha
        if kind == "forward_kl":
            return -torch.expm1((-log_ratio).clamp(max=80.0))
        if kind == "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratio)
        if kind == "alpha_divergence" and alpha != 1.0:
            return torch.expm1(((alpha - 1) * log_ratio).clamp(max=80.0)) / (alpha - 1)
        return log_ratio

    def shares(self, batch: Batch) -> Tensor:
        """Liu et al. 2024, "Length Desensitization in DPO", equation 7: tokens beyond the shorter answer count less."""
        import torch

        from loomtune.toolkit import row_sums

        shares = super().shares(batch)
        if self.settings.tail == 1.0:
            return shares
        lengths = row_sums(torch.ones_like(shares), batch)
        both = torch.minimum(lengths[batch.part == CHOSEN], lengths[batch.part == REJECTED])
        shorter = torch.zeros_like(lengths)
        for answer in (CHOSEN, REJECTED):
            shorter[batch.part == answer] = both
        begins = torch.cumsum(lengths, 0) - lengths  # the targets of a segment follow each other, in its order
        place = torch.arange(len(shares), device=shares.device) - begins[batch.row]
        return torch.where(place < shorter[batch.row], shares, shares * self.settings.tail)

    def looks(self) -> list[Look]:
        from loomtune.toolkit import log_sum_squares

        return [log_sum_squares] if self.settings.weighting else []

    def importance(self, targets: Tensor, seen: Sequence[Tensor], batch: Batch) -> Tensor:
        """Zhou et al. 2024, "WPO", equations 2 and 4: how likely the policy itself gives both answers, sampled tokens
        aligned by what it would give on average."""
        if not self.settings.weighting:
            return super().importance(targets, seen, batch)
        from loomtune.toolkit import row_sums

        aligned = row_sums(targets - seen[0], batch) / row_sums(targets.new_ones(len(targets)), batch).clamp(min=1)
        return (aligned[batch.part == CHOSEN] + aligned[batch.part == REJECTED]).exp()


def _check(settings: DpoSettings) -> None:
    faults = unknown(settings, divergence=DIVERGENCES, reference=references.CHOICES)
    if settings.divergence != "alpha_divergence" and settings.divergence_alpha != DpoSettings().divergence_alpha:
        what = f"objective.divergence_alpha has no effect with objective.divergence={settings.divergence}"
        faults.append(Fault(what, "leave it out, or set objective.divergence=alpha_divergence"))
    if not 0 <= settings.tail <= 1:
        faults.append(Fault(f"objective.tail={settings.tail} is no share", "set objective.tail between 0 and 1"))
    refuse(faults)
