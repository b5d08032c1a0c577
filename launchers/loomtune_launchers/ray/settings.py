"""Settings of launcher=ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from loomtune.settings import option
from loomtune_launchers.settings import NodesSettings


@dataclass
class RaySettings(NodesSettings):
    """A Ray cluster whose nodes see the run's folder."""

    nodes: Union[int, str] = option(  # noqa: UP007 - OmegaConf 2.3 knows no `int | str`
        1, "nodes; `least:most` takes as many of them as the cluster has room for, at each start"
    )
    procs: Union[int, str] = option(  # noqa: UP007
        "auto", "processes on each node; `auto`: one for each of launcher.gpus, or one where none is asked for"
    )
    address: str = option("auto", "the cluster, `host:port`; `auto`: that of RAY_ADDRESS, or of this machine")
    gpus: int = option(0, "GPUs of each node; 0: none is asked for, and Ray hides none")
    cpus: int = option(1, "CPUs that Ray sets aside for each process")
    memory: str = option("", "memory that Ray sets aside on each node, `64G`; empty: none")
    strategy: str = option(
        "STRICT_SPREAD", "where nodes may lie: `STRICT_SPREAD` on so many machines, `SPREAD`, `PACK`"
    )
    patience: int = option(300, "seconds to wait for room on the cluster")
    requeues: int = option(0, "how often a run that lost a node, or that somebody else asked to leave, is placed anew")
