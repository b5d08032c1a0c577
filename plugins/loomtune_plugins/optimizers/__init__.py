"""Optimizers."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Optimizer
from loomtune.offers import Offer
from loomtune_plugins.optimizers.settings import AdamWSettings, SGDSettings


@hookimpl
def optimizers() -> Sequence[Offer[Optimizer]]:
    """Gives the built-in optimizers."""
    return (
        Offer(
            name="adamw",
            build="loomtune_plugins.optimizers.adamw:AdamW",
            schema=AdamWSettings,
            summary="Adam with decoupled weight decay",
        ),
        Offer(
            name="sgd",
            build="loomtune_plugins.optimizers.sgd:SGD",
            schema=SGDSettings,
            summary="gradient descent, with momentum if wanted",
        ),
    )
