"""A linear schedule."""

from loomtune.contracts import Schedule
from loomtune_plugins.schedules import warmup
from loomtune_plugins.schedules.settings import LinearSettings


class Linear(Schedule):
    """Rises to the peak, then falls along a line: floor + (1 - floor) * (1 - progress).

    See `warmup` for how steps are counted.
    """

    def __init__(self, settings: LinearSettings) -> None:
        warmup.check(settings.warmup, settings.floor)
        self._settings = settings

    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak rate in a step, counted from 1."""
        warm = warmup.warm_steps(self._settings.warmup, steps)
        if step < warm:
            return warmup.rising(step, warm)
        return self._settings.floor + (1.0 - self._settings.floor) * (1.0 - warmup.progress(step, steps, warm))
