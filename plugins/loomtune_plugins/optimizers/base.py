"""What all optimizers here have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Optimizer, ParameterGroup, StateKind
from loomtune.errors import UserError
from loomtune_plugins.optimizers.groups import check, check_share, torch_groups

if TYPE_CHECKING:
    import torch

    from loomtune_plugins.optimizers.start import Pull

SHARES = ("beta1", "beta2", "momentum")


class Checked(Optimizer):
    """One whose settings hold a peak rate and a largest gradient norm."""

    def __init__(self, settings: Any) -> None:
        """Raises UserError for numbers that make no sense."""
        given = vars(settings)
        check(**{name: given[name] for name in ("lr", "eps", "weight_decay", "clip") if name in given})
        check_share(**{name: given[name] for name in SHARES if name in given})
        self._settings = settings

        if "decay_to" in given:
            _check_goal(given["decay_to"], given["weight_decay"])

    @property
    def learning_rate(self) -> float:
        """The peak rate."""
        rate: float = self._settings.lr
        return rate

    @property
    def clip(self) -> float:
        """Largest global gradient norm; 0 for no clipping."""
        clip: float = self._settings.clip
        return clip

    @property
    def to_start(self) -> bool:
        """True where weights decay to where they began."""
        return bool(self._settings.decay_to == "start")

    def groups(self, groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
        """torch's groups; where decay leads to the start, torch itself decays nothing."""
        from loomtune_plugins.optimizers.start import DECAY

        made = torch_groups(groups, self._settings.lr, self._settings.weight_decay)
        if self.to_start:
            for group in made:
                group[DECAY], group["weight_decay"] = group["weight_decay"], 0.0
        return made

    def pulled(self, optimizer: torch.optim.Optimizer, pull: Pull) -> torch.optim.Optimizer:
        """The optimizer, which keeps the start where it is asked for."""
        from loomtune_plugins.optimizers.start import keep_start

        if self.to_start:
            keep_start(optimizer, pull)
        return optimizer

    def starts(self) -> Mapping[str, StateKind]:
        """What is kept for it."""
        return {"start": StateKind.LIKE} if self.to_start else {}


def _check_goal(goal: str, decay: float) -> None:
    if goal not in ("zero", "start"):
        raise UserError.of(f"optimizer.decay_to={goal} is not known", "set optimizer.decay_to to zero or start")
    if goal == "start" and not decay:
        what = "optimizer.decay_to=start has no effect with optimizer.weight_decay=0"
        raise UserError.of(what, "set optimizer.weight_decay, for instance to 0.1, or leave decay_to out")
