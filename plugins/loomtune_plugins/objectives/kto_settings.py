"""Settings of learning from answers that are wanted or not."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.objectives import references
from loomtune_plugins.objectives.pairs_settings import TextSettings

VARIANTS = ("kto", "apo_zero_unpaired")


@dataclass
class KtoSettings(TextSettings):
    """What an answer is measured against, and how much it counts."""

    variant: str = option("kto", "kto: against how far the policy is from the reference; apo_zero_unpaired: against 0")
    beta: float = option(0.1, "how strongly an answer counts")
    desirable: float = option(1.0, "what each wanted answer counts")
    undesirable: float = option(1.0, "what each unwanted answer counts; larger where there are fewer of them")
    reference: str = option(
        "auto", f"{references.HELP} or variant=kto, whose answers to other prompts change each step"
    )
    entropy: bool = option(False, "log the policy's entropy on the answers, which costs another pass over the logits")
