"""Settings of the adapters that put something of their own before each sample."""

from dataclasses import dataclass

from loomtune.settings import option

INITS = ("vocabulary", "text", "random")
PREFIX_INITS = ("random", "zero")


@dataclass
class PromptSettings:
    """Prompt tuning. Usual learning rates are a hundred times those of full fine-tuning and more (its authors: 0.3)."""

    length: int = option(20, "virtual tokens before each sample; they take room from the model's context")
    init: str = option(
        "vocabulary",
        "first values: `vocabulary` (embeddings of tokens drawn by the seed), `text` (those of `text`), or `random` "
        "(normal, as wide as embeddings are)",
    )
    text: str = option("", "what to begin with, where `init` is `text`: repeated or cut to `length` tokens")


@dataclass
class PtuningSettings:
    """P-tuning: virtual tokens that a small network makes, which is left out of what is saved."""

    length: int = option(20, "virtual tokens before each sample; they take room from the model's context")
    width: int = option(0, "inner width of the network; 0: the model's own")


@dataclass
class PrefixSettings:
    """Prefix tuning: keys and values that every layer's attention sees before those of each sample."""

    length: int = option(20, "tokens that the prefix stands for; they take room from the model's context")
    init: str = option("random", "first values: `random` (normal, of deviation 1) or `zero`")
    projection: bool = option(False, "make keys and values by a small network, which is left out of what is saved")
    width: int = option(0, "inner width of that network; 0: that of a token's keys in one layer")
