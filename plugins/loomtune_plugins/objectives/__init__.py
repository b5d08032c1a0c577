"""What is learned from rows. Importing this folder imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Objective
from loomtune.offers import Offer, Trait
from loomtune_plugins.objectives.dpo_settings import DpoSettings
from loomtune_plugins.objectives.sft_settings import SftSettings


@hookimpl
def objectives() -> Sequence[Offer[Objective]]:
    """Offers the built-in objectives."""
    return (
        Offer(
            name="sft",
            build="loomtune_plugins.objectives.sft:Sft",
            schema=SftSettings,
            summary="supervised fine-tuning: the next token of answers, conversations or plain text",
            needs=frozenset({Trait.COMPLETIONS}),
        ),
        Offer(
            name="dpo",
            build="loomtune_plugins.objectives.dpo:Dpo",
            schema=DpoSettings,
            summary="prefers the better of two answers, measured against a frozen reference",
            needs=frozenset({Trait.PAIRS}),
            brings={"loss": ("sigmoid",)},
        ),
    )
