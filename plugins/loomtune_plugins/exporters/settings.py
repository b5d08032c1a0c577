"""Settings of the exporters."""

from dataclasses import dataclass

from loomtune.settings import option

DTYPE = "type of the weights: auto (as the base's files store each), fp32, bf16 or fp16"


@dataclass
class HuggingFaceSettings:
    """A folder in the format of Hugging Face."""

    shard_gigabytes: float = option(5.0, "most bytes of a file of weights, in 10^9; as much memory is needed")
    dtype: str = option("auto", DTYPE)


@dataclass
class AdapterSettings:
    """The adapter alone has nothing to set."""
