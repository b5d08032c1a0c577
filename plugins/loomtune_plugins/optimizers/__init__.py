"""Optimizers."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Optimizer
from loomtune.offers import Offer, Trait
from loomtune_plugins.optimizers.adamw_8bit_settings import AdamW8bitSettings
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
        Offer(
            name="adamw_8bit",
            build="loomtune_plugins.optimizers.adamw_8bit:AdamW8bit",
            schema=AdamW8bitSettings,
            summary="AdamW whose moments take a byte each, or lie in host memory when they must (bitsandbytes)",
            provides=frozenset({Trait.SHAPED_UPDATES}),
            extra="quantised",
        ),
    )
