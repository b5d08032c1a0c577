"""A cosine schedule."""

import math

from loomtune.contracts import Schedule
from loomtune_plugins.schedules import warmup
from loomtune_plugins.schedules.settings import CosineSettings


class Cosine(Schedule):
    """Rises to the peak, then falls along half a cosine: floor + (1 - floor) * (1 + cos(pi * progress)) / 2.

    Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts. See `warmup` for how steps are counted.
    """

    def __init__(self, settings: CosineSettings) -> None:
        warmup.check(settings.warmup, settings.floor)
        self._settings = settings

    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak rate in a step, counted from 1."""
        warm = warmup.warm_steps(self._settings.warmup, steps)
        if step < warm:
            return warmup.rising(step, warm)
        fall = 0.5 * (1.0 + math.cos(math.pi * warmup.progress(step, steps, warm)))
        return self._settings.floor + (1.0 - self._settings.floor) * fall
