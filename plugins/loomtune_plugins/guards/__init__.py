"""Judges of steps."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Guard
from loomtune.offers import Offer
from loomtune_plugins.guards.settings import FiniteSettings, StallSettings


@hookimpl
def guards() -> Sequence[Offer[Guard]]:
    """Gives the built-in guards."""
    return (
        Offer(
            name="finite",
            build="loomtune_plugins.guards.finite:Finite",
            schema=FiniteSettings,
            summary="skips steps whose loss or gradient is not finite; stops the run after too many in a row",
        ),
        Offer(
            name="stall",
            build="loomtune_plugins.guards.stall:Stall",
            schema=StallSettings,
            summary="ends a process that makes no step for too long, and leaves the stacks of its threads",
        ),
    )
