"""Where models come from: Hugging Face folders and ids, runs, drawn weights, and the small model that is shipped."""

from loomtune import hookimpl
from loomtune.offers import Offer
from loomtune_plugins.models.rules import preflight
from loomtune_plugins.models.settings import HuggingFaceSettings, RandomSettings, TinySettings

__all__ = ["models", "preflight"]


@hookimpl
def models() -> list[Offer]:  # type: ignore[type-arg]
    """Three ways to come by a causal language model."""
    return [
        Offer(
            name="huggingface",
            build="loomtune_plugins.models.huggingface:HuggingFace",
            schema=HuggingFaceSettings,
            summary="a Hugging Face folder or hub id, or the model that a run trained",
        ),
        Offer(
            name="tiny",
            build="loomtune_plugins.models.huggingface:Tiny",
            schema=TinySettings,
            summary="the small pretrained Llama that is shipped",
        ),
        Offer(
            name="random",
            build="loomtune_plugins.models.random:Random",
            schema=RandomSettings,
            summary="any architecture with weights drawn from the seed",
        ),
    ]
