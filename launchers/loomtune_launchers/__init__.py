"""Launchers: they start torchrun somewhere, and import no torch themselves."""

from __future__ import annotations

from loomtune import hookimpl
from loomtune.contracts import Launcher
from loomtune.offers import Offer
from loomtune_launchers.settings import LocalSettings


@hookimpl
def launchers() -> list[Offer[Launcher]]:
    return [
        Offer(
            name="local",
            build="loomtune_launchers.local:Local",
            schema=LocalSettings,
            summary="torchrun on this machine, in the foreground",
        )
    ]
