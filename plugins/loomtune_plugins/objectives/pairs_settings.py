"""Settings of the objectives that learn from pairs of answers."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class TextSettings:
    """How prompts and answers are put together."""

    separator: str = option("", "text between prompt and answer, part of the prompt")
    bos: str = option("auto", "the beginning token: auto, as the tokenizer or the chat template does; always; never")
    system: str = option("", "the system prompt of conversations that have none; empty: nothing is put before them")


PROBABILITY = "the rows' column of how likely the chosen answer is the better one; rows without it, and empty: it is"


@dataclass
class PairsSettings(TextSettings):
    """What is compared, and how much it counts."""

    beta: float = option(0.1, "how strongly a preference counts")
    probability: str = option("", PROBABILITY)
    entropy: bool = option(False, "log the policy's entropy on the answers, which costs another pass over the logits")


@dataclass
class SimpoSettings(PairsSettings):
    """SimPO compares means over tokens, which are smaller than sums."""

    beta: float = option(2.0, "how strongly a preference counts; 2 to 2.5 are its authors' values")


@dataclass
class OrpoSettings(PairsSettings):
    """What ORPO's likelihood is of."""

    likelihood: str = option(
        "all", "what is learned beside the preference: all, the prompt and the chosen answer; answer"
    )
