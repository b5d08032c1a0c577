"""Settings of `launcher=slurm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from loomtune.settings import option
from loomtune_launchers.settings import NodesSettings


@dataclass
class SlurmSettings(NodesSettings):
    """A Slurm cluster."""

    nodes: Union[int, str] = option(  # noqa: UP007 - OmegaConf 2.3 knows no `int | str`
        1, "nodes; `least:most` takes as many as Slurm can give at each start, after a lost node too"
    )
    procs: Union[int, str] = option(  # noqa: UP007
        "auto", "processes on each node; `auto`: one for each of launcher.gpus, or one where none is asked for"
    )
    grace: int = option(60, "seconds before the time limit at which the run is asked to save and leave")
    gpus: int = option(0, "GPUs of each node; 0: none is asked for")
    cpus: int = option(0, "cores of each process; 0: as the cluster decides")
    memory: str = option("", "memory of each node, as Slurm writes it: `64G`; empty: as the cluster decides")
    time: Union[int, str] = option(  # noqa: UP007
        0, "time limit of one start: seconds, or as Slurm writes it (`2-00:00:00`); 0: the partition's"
    )
    partition: str = option("", "where the job waits; empty: the cluster's default")
    account: str = option("", "who pays; empty: the user's default")
    qos: str = option("", "quality of service; empty: the default")
    reservation: str = option("", "a reservation to run in")
    constraint: str = option("", "features that nodes must have, as Slurm writes them: `a100&nvlink`")
    requeues: int = option(
        10, "how often the job may be queued again after a preemption, a time limit or a lost node, in all"
    )
    wait: bool = option(False, "follow the log until the run is over; else return once the job is queued")
    options: list[str] = option([], "further options of sbatch, each as one text: `--exclusive`")
    setup: list[str] = option([], "lines of shell that run on the first node before the run: `module load cuda`")
    python: str = option("", "interpreter on the nodes; empty: this one, or `python3` in a container")
    container: str = option("", "what runs the processes in an image: `pyxis` or `apptainer`; empty: none")
    image: str = option("", "the container's image, as pyxis or apptainer names it")
    mounts: list[str] = option([], "`from:to` of further folders that the container sees; the run's folder it does")
