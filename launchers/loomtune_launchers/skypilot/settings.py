"""What a job on a cloud is given, by SkyPilot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

from loomtune.settings import option
from loomtune_launchers.settings import GroupSettings


@dataclass
class SkyPilotSettings(GroupSettings):
    """A task of SkyPilot: machines of a cloud, taken for this run."""

    nodes: int = option(1, "machines")
    procs: Union[int, str] = option(  # noqa: UP007 - OmegaConf 2.3 knows no `int | str`
        "auto", "processes on each machine; `auto`: one for each GPU of `accelerators`, or one"
    )
    threads: int = option(0, "CPU threads of each process; 0: as torchrun has it")
    restarts: int = option(0, "how often torchrun starts the processes again after a failure, from the last checkpoint")
    managed: bool = option(False, "a managed job, which SkyPilot starts again where machines are taken away")
    job: str = option("", "name of the job, and of its machines; empty: from the run's folder")
    infra: str = option("", "cloud, region and zone, as `aws/us-east-1`; empty: the cheapest that SkyPilot finds")
    accelerators: str = option("", "GPUs of each machine, as `H100:8`; empty: none")
    cpus: str = option("", "cores of each machine, as `16` or `16+`")
    memory: str = option("", "GiB of memory of each machine, as `64` or `64+`")
    use_spot: bool = option(False, "machines that are cheaper and may be taken away")
    disk_size: int = option(0, "GiB of each machine's disk; 0: SkyPilot's default")
    image_id: str = option("", "machine image, or `docker:` and a container's")
    workdir: str = option("", "folder of this machine that is copied there, and that the run starts in")
    file_mounts: dict[str, Any] = option({}, "path there to a folder here, or to a bucket as SkyPilot describes it")
    volumes: dict[str, str] = option({}, "path there to one of SkyPilot's volumes")
    run_dir: str = option("", "the run's folder there; empty: in the first of `volumes`, else of the mounted buckets")
    setup: str = option("", "a script that makes each machine ready: `pip install loomtune`")
    python: str = option("python", "the interpreter there that has loomtune")
    secrets: list[str] = option([], "variables of this machine's environment that the job has too, hidden")
    down: bool = option(True, "give the machines back when the run is over")
