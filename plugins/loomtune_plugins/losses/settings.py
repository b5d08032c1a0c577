"""Settings of the losses."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class PairLossSettings:
    """A loss without a setting of its own."""

    weight: float = option(1.0, "its share where several losses are mixed")
