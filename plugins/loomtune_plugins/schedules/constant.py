"""A constant schedule."""

from loomtune.contracts import Schedule
from loomtune_plugins.schedules import warmup
from loomtune_plugins.schedules.settings import ConstantSettings


class Constant(Schedule):
    """Rises to the peak and stays there. See `warmup` for how steps are counted."""

    def __init__(self, settings: ConstantSettings) -> None:
        warmup.check(settings.warmup)
        self._settings = settings

    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak rate in a step, counted from 1."""
        return warmup.rising(step, warmup.warm_steps(self._settings.warmup, steps))
