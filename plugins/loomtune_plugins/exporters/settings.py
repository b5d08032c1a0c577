"""Settings of the exporters."""

from dataclasses import dataclass

from loomtune.settings import option

CHECK = "compare it with what was trained before it gets its name; a model in fp32 must fit the host's memory for that"
DTYPE = "type of the weights: auto (as the base's files store each), fp32, bf16 or fp16"


@dataclass
class HuggingFaceSettings:
    """A folder in the format of Hugging Face."""

    shard_gigabytes: float = option(5.0, "most bytes of a file of weights, in 10^9; as much memory is needed")
    dtype: str = option("auto", DTYPE)
    check: bool = option(True, CHECK)


@dataclass
class AdapterSettings:
    """The adapter alone."""

    check: bool = option(True, CHECK)
