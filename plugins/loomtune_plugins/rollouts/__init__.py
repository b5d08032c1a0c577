"""Engines that generate completions during training."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Rollout
from loomtune.offers import Offer, Trait
from loomtune_plugins.rollouts.settings import HuggingFaceSettings


@hookimpl
def rollouts() -> Sequence[Offer[Rollout]]:
    """Gives the built-in engines."""
    return (
        Offer(
            name="huggingface",
            build="loomtune_plugins.rollouts.huggingface:HuggingFace",
            schema=HuggingFaceSettings,
            summary="transformers' generate in the training process, with the weights gathered for the call",
            provides=frozenset({Trait.GENERATION}),
        ),
    )
