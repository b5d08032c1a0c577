"""Measurements of a model."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Evaluator
from loomtune.offers import Offer, Trait
from loomtune_plugins.evaluators.settings import HeldoutSettings, SQLAccuracySettings


@hookimpl
def evaluators() -> Sequence[Offer[Evaluator]]:
    """Gives the built-in evaluators."""
    return (
        Offer(
            name="heldout",
            build="loomtune_plugins.evaluators.heldout:Heldout",
            schema=HeldoutSettings,
            summary="the objective's loss on rows that are not trained on",
        ),
        Offer(
            name="sql_accuracy",
            build="loomtune_plugins.evaluators.sql_accuracy:SQLAccuracy",
            schema=SQLAccuracySettings,
            summary="the share of generated queries that return what the right query returns",
            needs=frozenset({Trait.DATABASES, Trait.GENERATION}),
        ),
    )
