"""What a job on Kubernetes is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Union

from loomtune.settings import option
from loomtune_launchers.settings import GroupSettings


@dataclass
class KubernetesSettings(GroupSettings):
    """A TrainJob of Kubeflow, or a JobSet."""

    kind: str = option(
        "trainjob", "`trainjob`: Kubeflow Trainer's; `jobset`: without Kubeflow", among=("trainjob", "jobset")
    )
    nodes: int = option(1, "pods; each is a node of torchrun")
    procs: Union[int, str] = option(  # noqa: UP007 - OmegaConf 2.3 knows no `int | str`
        "auto", "processes in each pod; `auto`: one for each of `gpus`, or one"
    )
    threads: int = option(0, "CPU threads of each process; 0: `cpus`, where they are set")
    restarts: int = option(0, "how often torchrun starts the processes again after a failure, from the last checkpoint")
    requeues: Optional[int] = option(  # noqa: UP045
        None, "how often a preempted job, or one whose node is lost, is started again (`jobset` only; empty: 10)"
    )
    time: int = option(0, "seconds after which the job is ended; 0: never")
    context: str = option("", "kubectl's context; empty: the current one")
    namespace: str = option("", "namespace; empty: the context's")
    job: str = option("", "name of the job; empty: from the run's folder")
    image: str = option("", "container image with loomtune; a TrainJob's runtime may have one")
    image_pull_secrets: list[str] = option([], "secrets that open the image's registry")
    python: str = option("python", "the interpreter in the image that has loomtune")
    gpus: int = option(0, "GPUs of each pod")
    gpu_resource: str = option("nvidia.com/gpu", "what the cluster calls a GPU")
    cpus: int = option(0, "cores of each process; 0: nothing is asked for")
    memory: str = option("", "memory of each pod, as `64Gi`; empty: nothing is asked for")
    shm: str = option("8Gi", "the most that /dev/shm holds, for NCCL and data loaders; empty: as the image has it")
    volume: str = option("", "PersistentVolumeClaim of the run (ReadWriteMany where nodes > 1), and of its data")
    mount: str = option("/loomtune", "where `volume` is mounted")
    run_dir: str = option("", "the run's folder in the pods; empty: MOUNT/runs/<job>")
    runtime: str = option("", "a TrainJob's runtime; empty: torch-distributed")
    runtime_kind: str = option("", "ClusterTrainingRuntime (meant where empty) or TrainingRuntime, of this namespace")
    service_account: str = option("", "service account of the pods")
    node_selector: dict[str, str] = option({}, "labels of the machines that may be used")
    tolerations: list[dict[str, Any]] = option([], "tolerations of the pods, as Kubernetes writes them")
    labels: dict[str, str] = option({}, "labels of the job and its pods, kueue.x-k8s.io/queue-name for one")
    secrets: dict[str, str] = option({}, "environment variables from secrets: {HF_TOKEN: secret/key}")
