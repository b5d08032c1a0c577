"""Settings of IA3."""

from dataclasses import dataclass
from typing import Optional

from loomtune.settings import option


@dataclass
class IA3Settings:
    """Learned factors of keys, values and the feed-forward's inner activations: some ten thousand numbers.

    Usual learning rates are about a hundred times those of full fine-tuning. Weight decay pulls the factors to 0 and
    not to 1: set `optimizer.weight_decay=0` for long runs.
    """

    targets: Optional[list[str]] = option(  # noqa: UP045
        None,
        "linear layers: names such as `k_proj`, patterns such as `*.mlp.*`, or `all-linear`; null: keys, values and "
        "the feed-forward's last layer, by the names that models usually give them",
    )
    feedforward: Optional[list[str]] = option(  # noqa: UP045
        None, "those of the targets whose inputs are scaled and not their outputs; null: by the usual names"
    )
