"""Losses of pairs of answers. Importing this folder imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Loss
from loomtune.offers import Offer
from loomtune_plugins.losses.settings import PairLossSettings


@hookimpl
def losses() -> Sequence[Offer[Loss]]:
    return (
        Offer(
            name="sigmoid",
            build="loomtune_plugins.losses.margins:Sigmoid",
            schema=PairLossSettings,
            summary="DPO: the log-odds that the chosen answer is preferred",
        ),
    )
