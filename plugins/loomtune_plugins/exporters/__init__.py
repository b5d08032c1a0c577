"""Forms in which a trained model leaves."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Exporter
from loomtune.offers import Offer
from loomtune_plugins.exporters.settings import HuggingFaceSettings


@hookimpl
def exporters() -> Sequence[Offer[Exporter]]:
    """Gives the built-in exporters."""
    return (
        Offer(
            name="huggingface",
            build="loomtune_plugins.exporters.huggingface:HuggingFace",
            schema=HuggingFaceSettings,
            summary="a folder of safetensors, config and tokenizer, as transformers and most servers open it",
        ),
    )
