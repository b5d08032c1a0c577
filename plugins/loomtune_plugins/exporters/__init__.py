"""Forms in which a trained model leaves."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Exporter
from loomtune.offers import Offer, Trait
from loomtune_plugins.exporters.settings import AdapterSettings, HuggingFaceSettings


@hookimpl
def exporters() -> Sequence[Offer[Exporter]]:
    """Gives the built-in exporters."""
    return (
        Offer(
            name="huggingface",
            build="loomtune_plugins.exporters.huggingface:HuggingFace",
            schema=HuggingFaceSettings,
            summary="a folder of safetensors, config and tokenizer, as transformers and most servers open it",
            excludes={Trait.UNMERGEABLE: "what it learns cannot be merged into the model's weights"},
        ),
        Offer(
            name="adapter",
            build="loomtune_plugins.exporters.adapter:AdapterAlone",
            schema=AdapterSettings,
            summary="the adapter alone in peft's format with the tokenizer, as servers load it beside its base",
            excludes={Trait.WHOLE_MODEL: "it trains the model itself and adds nothing that could leave alone"},
        ),
    )
