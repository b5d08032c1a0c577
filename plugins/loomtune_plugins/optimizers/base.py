"""What all optimizers here have in common."""

from __future__ import annotations

from typing import Any

from loomtune.contracts import Optimizer
from loomtune_plugins.optimizers.groups import check, check_share

SHARES = ("beta1", "beta2", "momentum")


class Checked(Optimizer):
    """One whose settings hold a peak rate and a largest gradient norm."""

    def __init__(self, settings: Any) -> None:
        """Raises UserError for numbers that make no sense."""
        given = vars(settings)
        check(**{name: given[name] for name in ("lr", "eps", "weight_decay", "clip") if name in given})
        check_share(**{name: given[name] for name in SHARES if name in given})
        self._settings = settings

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
