"""Settings of the rewards."""

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class SqlSettings:
    """What a query returns, beside what the right one returns."""

    weight: float = option(1.0, "what the score is multiplied with in the sum of all rewards")
    valid: float = option(0.0, "score of a query that runs and returns something else")
    overlap: float = option(0.0, "added to `valid`, times the share of rows that are right (F1)")
    broken: float = option(0.0, "score of a query that does not run")
    seconds: float = option(1.0, "time that a query may take")
