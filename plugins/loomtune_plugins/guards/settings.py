"""Settings of the guards."""

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class FiniteSettings:
    """Steps that are not finite."""

    patience: int = option(10, "steps in a row that may be skipped; one more stops the run")


@dataclass
class StallSettings:
    """Processes that hang."""

    seconds: float = option(
        1800.0, "longest time between two signs of life: steps, and pieces of rollouts and evaluations"
    )
