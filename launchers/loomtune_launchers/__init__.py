"""Launchers: they start torchrun somewhere, and import no torch themselves."""

from __future__ import annotations

from loomtune import hookimpl
from loomtune.contracts import Launcher
from loomtune.offers import Offer
from loomtune_launchers.kubernetes.settings import KubernetesSettings
from loomtune_launchers.ray.settings import RaySettings
from loomtune_launchers.settings import LocalSettings
from loomtune_launchers.skypilot.settings import SkyPilotSettings
from loomtune_launchers.slurm.settings import SlurmSettings
from loomtune_launchers.ssh.settings import SshSettings


@hookimpl
def launchers() -> list[Offer[Launcher]]:
    return [
        Offer(
            name="local",
            build="loomtune_launchers.local:Local",
            schema=LocalSettings,
            summary="torchrun on this machine, in the foreground",
        ),
        Offer(
            name="ssh",
            build="loomtune_launchers.ssh.ssh:Ssh",
            schema=SshSettings,
            summary="torchrun on hosts that ssh reaches, in the foreground",
        ),
        Offer(
            name="slurm",
            build="loomtune_launchers.slurm.slurm:Slurm",
            schema=SlurmSettings,
            summary="a job of a Slurm cluster, queued again when it is preempted",
        ),
        Offer(
            name="ray",
            build="loomtune_launchers.ray.ray:Ray",
            schema=RaySettings,
            extra="ray",
            summary="a Ray cluster, in the foreground",
        ),
        Offer(
            name="kubernetes",
            build="loomtune_launchers.kubernetes.kubernetes:Kubernetes",
            schema=KubernetesSettings,
            summary="a TrainJob of Kubeflow, or a JobSet, made by kubectl",
        ),
        Offer(
            name="skypilot",
            build="loomtune_launchers.skypilot.skypilot:SkyPilot",
            schema=SkyPilotSettings,
            summary="machines of a cloud, taken and given back by SkyPilot",
        ),
    ]
