"""What losses of pairs have in common."""

from __future__ import annotations

from typing import Any

from loomtune.contracts import Loss
from loomtune.errors import UserError


class PairLoss(Loss):
    """One whose settings say its weight. name: as `loss=` chooses it."""

    name: str

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.weight = settings.weight
        self.check()

    def check(self) -> None:
        """Raises UserError for settings that mean nothing."""
        smoothing = getattr(self.settings, "label_smoothing", 0.0)
        if not 0 <= smoothing < 0.5:
            what = f"loss.{self.name}.label_smoothing={smoothing} is no share of wrong labels below one half"
            raise UserError.of(what, f"set loss.{self.name}.label_smoothing to 0 or more and below 0.5")
