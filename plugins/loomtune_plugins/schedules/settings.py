"""Settings of the schedules."""

from dataclasses import dataclass
from typing import Union

from loomtune.settings import option

WARMUP = "warm-up: optimizer steps, or below 1 a share of the run's steps, rounded down"
FLOOR = "factor of the peak rate that the end of the run approaches, 0 to 1"


@dataclass
class CosineSettings:
    """Half a cosine."""

    warmup: Union[int, float] = option(0.03, WARMUP)  # noqa: UP007 - OmegaConf's structured configs know only this form
    floor: float = option(0.0, FLOOR)


@dataclass
class LinearSettings:
    """A straight line."""

    warmup: Union[int, float] = option(0.03, WARMUP)  # noqa: UP007
    floor: float = option(0.0, FLOOR)


@dataclass
class ConstantSettings:
    """No decay."""

    warmup: Union[int, float] = option(0, WARMUP)  # noqa: UP007
