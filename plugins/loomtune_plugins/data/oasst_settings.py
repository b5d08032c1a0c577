"""Settings of conversation trees."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.data.split_settings import OrderSettings

FORMATS = ("preference", "unpaired", "messages", "prompt")


@dataclass
class OasstSettings(OrderSettings):
    """Which trees, and what rows are made of them."""

    format: str = option(
        "preference",
        "preference: pairs of ranked replies; unpaired: the best and the worst reply, labelled; messages: the "
        "conversation of best-ranked replies; prompt: every message that wants a reply",
    )
    lang: str = option("", "only messages in this language, such as en; empty: in any")
