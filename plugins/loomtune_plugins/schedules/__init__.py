"""Learning-rate schedules."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Schedule
from loomtune.offers import Offer
from loomtune_plugins.schedules.settings import ConstantSettings, CosineSettings, LinearSettings


@hookimpl
def schedules() -> Sequence[Offer[Schedule]]:
    """Gives the built-in schedules."""
    return (
        Offer(
            name="cosine",
            build="loomtune_plugins.schedules.cosine:Cosine",
            schema=CosineSettings,
            summary="warm-up, then half a cosine down to `floor`",
        ),
        Offer(
            name="linear",
            build="loomtune_plugins.schedules.linear:Linear",
            schema=LinearSettings,
            summary="warm-up, then a straight line down to `floor`",
        ),
        Offer(
            name="constant",
            build="loomtune_plugins.schedules.constant:Constant",
            schema=ConstantSettings,
            summary="warm-up, then the peak rate to the end",
        ),
    )
