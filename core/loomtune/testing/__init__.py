"""The conformance kit: what an author of a plugin runs to see that it keeps its axis' contract.

Each check raises AssertionError, in words, at the first promise that is not kept. They need neither a GPU nor a model:
a toy network of a few thousand parameters stands in. Importing this package imports no torch; most checks do.
"""

from typing import Any

from loomtune.testing.objective import check_objective
from loomtune.testing.offer import check_light, check_offer
from loomtune.testing.optimizer import check_optimizer
from loomtune.testing.schedule import check_schedule
from loomtune.testing.sharding import check_sharding
from loomtune.testing.stage import check_stage
from loomtune.testing.tracker import check_tracker

__all__ = [
    "check_light",
    "check_objective",
    "check_offer",
    "check_optimizer",
    "check_schedule",
    "check_sharding",
    "check_stage",
    "check_tracker",
    "loss_from_log_probs",
    "loss_from_token_log_probs",
    "loss_of",
]


def __getattr__(name: str) -> Any:
    """These import torch, which importing this package does not."""
    if name in ("loss_of", "loss_from_log_probs", "loss_from_token_log_probs"):
        from loomtune.testing import recorded

        return getattr(recorded, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
