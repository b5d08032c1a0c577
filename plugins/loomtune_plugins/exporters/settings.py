"""Settings of the exporters."""

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class HuggingFaceSettings:
    """A folder in the format of Hugging Face."""

    shard_gigabytes: float = option(5.0, "most bytes of a file of weights, in 10^9; as much memory is needed")
