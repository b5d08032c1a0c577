"""Scores of completions. Importing this folder imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Reward
from loomtune.offers import Offer, Trait
from loomtune_plugins.rewards import settings


@hookimpl
def rewards() -> Sequence[Offer[Reward]]:
    """Offers the built-in rewards."""
    return (
        Offer(
            name="sql",
            build="loomtune_plugins.rewards.sql:Sql",
            schema=settings.SqlSettings,
            summary="1 for a query that returns what the right one returns",
            needs=frozenset({Trait.DATABASES}),
        ),
    )
