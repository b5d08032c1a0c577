"""Settings that launchers share; each launcher adds its own in a file beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from loomtune.settings import option


@dataclass
class GroupSettings:
    """The processes of a node."""

    procs: Union[int, str] = option(  # noqa: UP007 - OmegaConf 2.3 knows no `int | str`
        "auto", "processes on each node; `auto`: one for each GPU, or on a CPU one for every core up to 2"
    )
    threads: int = option(
        0, "CPU threads of each process; 0: OMP_NUM_THREADS where it is set, else the cores shared out evenly"
    )
    restarts: int = option(0, "how often the processes are started again after a failure, from the last checkpoint")
    grace: int = option(30, "seconds between a polite and a hard end")
    environment: dict[str, str] = option({}, "further environment variables of the processes")


@dataclass
class LocalSettings(GroupSettings):
    """This machine."""

    nodes: int = option(1, "nodes that `loomtune plan` plans for; more than this one are not started from here")


@dataclass
class NodesSettings(GroupSettings):
    """Several nodes."""

    nodes: Union[int, str] = option(  # noqa: UP007
        1, "nodes; `least:most` starts with as many as come, and goes on where some are lost"
    )
