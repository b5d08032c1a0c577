"""Attention back-ends."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Kernel
from loomtune.offers import Offer, Trait
from loomtune_plugins.kernels.settings import SDPASettings


@hookimpl
def kernels() -> Sequence[Offer[Kernel]]:
    """Gives the built-in back-ends."""
    return (
        Offer(
            name="sdpa",
            build="loomtune_plugins.kernels.sdpa:SDPA",
            schema=SDPASettings,
            summary="torch's scaled dot-product attention; a mask keeps segments apart where a row holds several",
            provides=frozenset({Trait.ISOLATED_SEGMENTS}),
        ),
    )
