"""What a job on Kubernetes cannot be, told before the cluster is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from loomtune.errors import Fault
from loomtune_launchers.kubernetes.settings import KubernetesSettings

KINDS = {"trainjob": "trainjobs.trainer.kubeflow.org", "jobset": "jobsets.jobset.x-k8s.io"}
"""What `launcher.kind` may be, and what kubectl calls it."""

QUANTITY = r"\d+(\.\d+)?([KMGTPE]i|[kMGTPE])?"
TOLERATION = {"key", "operator", "value", "effect", "tolerationSeconds"}


def faults(settings: KubernetesSettings) -> Iterator[Fault]:
    """All of them."""
    yield from _misfits(settings)
    yield from _values(settings)


def _misfits(settings: KubernetesSettings) -> Iterator[Fault]:
    """Settings that the kind does not know: without effect, they would mislead."""
    if settings.kind == "trainjob" and settings.requeues:
        what = f"launcher.requeues={settings.requeues}: a TrainJob starts again as its runtime says"
        yield Fault(what, "set launcher.kind=jobset, or a failurePolicy in the runtime")
    if settings.kind == "jobset":
        for key in ("runtime", "runtime_kind"):
            if getattr(settings, key):
                yield Fault(f"launcher.{key} is of TrainJobs alone", "leave it out, or set launcher.kind=trainjob")
        if not settings.image:
            yield Fault("a JobSet has no image of its own", "set launcher.image to one with loomtune")


def _values(settings: KubernetesSettings) -> Iterator[Fault]:
    """Values that the cluster would refuse, or take for something else."""
    if settings.kind not in KINDS:
        yield Fault(f"launcher.kind={settings.kind} is none", f"set launcher.kind to {' or '.join(KINDS)}")
    if settings.runtime_kind not in ("", "ClusterTrainingRuntime", "TrainingRuntime"):
        yield Fault(
            f"launcher.runtime_kind={settings.runtime_kind} is none", "set it to TrainingRuntime, or leave it out"
        )
    for key in ("memory", "shm"):
        value = getattr(settings, key)
        if value and not re.fullmatch(QUANTITY, value):
            yield Fault(f"launcher.{key}={value} is no amount for Kubernetes", f"set launcher.{key}=64Gi")
    if not settings.mount.startswith("/") or not PurePosixPath(settings.mount).name:
        yield Fault(f"launcher.mount={settings.mount} is no absolute path", "set launcher.mount=/loomtune")
    for name, where in settings.secrets.items():
        if not re.fullmatch(r"[^/]+/[^/]+", where):
            yield Fault(
                f"launcher.secrets.{name}={where} names no secret and key", f"set launcher.secrets.{name}=SECRET/KEY"
            )
        if name in settings.environment:
            yield Fault(f"{name} is both in launcher.environment and in launcher.secrets", "leave one of them out")
    for one in settings.tolerations:
        if odd := sorted({str(key) for key in one} - TOLERATION):
            yield Fault(f"a toleration has no {', '.join(odd)}", f"it has {', '.join(sorted(TOLERATION))}")
