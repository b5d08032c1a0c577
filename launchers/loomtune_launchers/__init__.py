"""Launchers: they start torchrun somewhere, and import no torch themselves."""

from __future__ import annotations

from loomtune import hookimpl
from loomtune.contracts import Launcher
from loomtune.offers import Offer
from loomtune_launchers.kubernetes_settings import KubernetesSettings
from loomtune_launchers.ray_settings import RaySettings
from loomtune_launchers.settings import LocalSettings
from loomtune_launchers.skypilot_settings import SkyPilotSettings
from loomtune_launchers.slurm_settings import SlurmSettings
from loomtune_launchers.ssh_settings import SshSettings


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
            build="loomtune_launchers.ssh:Ssh",
            schema=SshSettings,
            summary="torchrun on hosts that ssh reaches, in the foreground",
        ),
        Offer(
            name="slurm",
            build="loomtune_launchers.slurm:Slurm",
            schema=SlurmSettings,
            summary="a job of a Slurm cluster, queued again when it is preempted",
        ),
        Offer(
            name="ray",
            build="loomtune_launchers.ray:Ray",
            schema=RaySettings,
            extra="ray",
            summary="a Ray cluster, in the foreground",
        ),
        Offer(
            name="kubernetes",
            build="loomtune_launchers.kubernetes:Kubernetes",
            schema=KubernetesSettings,
            summary="a TrainJob of Kubeflow, or a JobSet, made by kubectl",
        ),
        Offer(
            name="skypilot",
            build="loomtune_launchers.skypilot:SkyPilot",
            schema=SkyPilotSettings,
            summary="machines of a cloud, taken and given back by SkyPilot",
        ),
    ]
