"""Settings of launcher=ssh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from loomtune.settings import option
from loomtune_launchers.settings import GroupSettings


@dataclass
class SshSettings(GroupSettings):
    """Hosts that ssh reaches and that see the run's folder."""

    procs: Union[int, str] = option(  # noqa: UP007 - OmegaConf 2.3 knows no `int | str`
        "auto", "processes on each host; `auto`: the slots of the hostfile, or 1 where the sharding cannot use several"
    )
    hosts: list[str] = option([], "hosts, each `[user@]host[:port]`")
    hostfile: str = option("", "in place of hosts: a file of lines `host slots=N`, as DeepSpeed and Open MPI read")
    python: str = option("", "Python on the hosts; default: the path of this one")
    folder: str = option("", "working directory on the hosts; default: the path of this one")
    address: str = option("", "name or address by which the hosts reach the first of them; default: as it is written")
    port: int = option(0, "port of the rendezvous on the first host; 0: a free one")
    options: list[str] = option([], "further options of the ssh program")
    patience: int = option(30, "seconds without a word over the connection after which a side gives the other up")
    requeues: int = option(0, "how often a run is started again that was asked to leave by somebody else")
