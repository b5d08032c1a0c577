"""The manifests: a TrainJob of Kubeflow Trainer, or a JobSet that gives its pods what Kubeflow would."""

from __future__ import annotations

import re
from typing import Any

import yaml

from loomtune.contracts import JobSpec
from loomtune_launchers import elsewhere
from loomtune_launchers.kubernetes.settings import KubernetesSettings

NODE = "node"
"""Of the pods and their container: Kubeflow's runtimes have it, and a JobSet has it from us."""

RANK = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
"""Where the number of a pod stands; `JOB_COMPLETION_INDEX` is made from it, too late for other variables."""

LIFE_AFTER_GRACE = 15
"""Seconds that torchrun has beyond the ranks' grace, before Kubernetes kills the pod."""

Tree = dict[str, Any]


def literal(text: str) -> str:
    """A text that arrives as it is: Kubernetes expands `$(NAME)` in commands and variables, and makes `$$` one `$`."""
    return text.replace("$", "$$")


def manifest(spec: JobSpec, settings: KubernetesSettings, folder: str) -> Tree:
    """The job as Kubernetes takes it. folder: the run's, in the pods."""
    build = _trainjob if settings.kind == "trainjob" else _jobset
    head = {"name": spec.name, **_given(labels=dict(settings.labels))}
    return {**build(spec, settings, _container(spec, settings, folder)), "metadata": head}


def text(manifest: Tree) -> str:
    """YAML in which no text can be taken for something else, by any version of it: `1e3`, `y`, `0o7`."""
    order = {key: manifest[key] for key in ("apiVersion", "kind", "metadata", "spec")}
    said: str = yaml.dump(order, Dumper=_Quoting, sort_keys=False, width=1 << 20, allow_unicode=False)
    return said


class _Quoting(yaml.SafeDumper):
    """Quotes every text that is no plain word."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quote(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[A-Za-z/][\w./-]+", text, re.ASCII)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Quoting.add_representer(str, _quote)


def _trainjob(spec: JobSpec, settings: KubernetesSettings, container: Tree) -> Tree:
    """Kubeflow adds `PET_*`, which torchrun reads, and merges the patch into its runtime's pods."""
    pod = _pod(spec, settings, {"name": NODE, **_given(volumeMounts=container["volumeMounts"])})
    patch = {"name": NODE, "template": {"spec": {"template": pod}}}
    trainer = {key: container[key] for key in ("image", "command", "args", "env") if key in container}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "spec": {
            "runtimeRef": {"name": settings.runtime or "torch-distributed", **_given(kind=settings.runtime_kind)},
            "trainer": {
                **trainer,
                "numNodes": spec.nodes[1],
                "numProcPerNode": spec.procs,
                **_given(resourcesPerNode=container["resources"]),
            },
            "runtimePatches": [
                {
                    "manager": "loomtune/launcher",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
                }
            ],
            **_given(activeDeadlineSeconds=spec.seconds),
        },
    }


def _jobset(spec: JobSpec, settings: KubernetesSettings, container: Tree) -> Tree:
    """An indexed Job behind a headless service. Preempted as a whole, it starts again as a whole; else it fails.

    A rank that was asked to stop leaves with 75 on every node, which the pods' policy tells from all other failures.
    """
    head = f"{spec.name}-{NODE}-0-0.{spec.name}"
    met = [
        {"name": "PET_NNODES", "value": str(spec.nodes[1])},
        {"name": "PET_NPROC_PER_NODE", "value": str(spec.procs)},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": RANK}}},
        {"name": "PET_MASTER_ADDR", "value": head},
        {"name": "PET_MASTER_PORT", "value": str(elsewhere.PORT)},
    ]
    container = {key: value for key, value in container.items() if value}
    container |= {"name": NODE, "env": [*met, *container["env"]], "ports": [{"containerPort": elsewhere.PORT}]}
    pod = _pod(spec, settings, container)
    pod["spec"]["restartPolicy"] = "Never"
    job = {
        "completionMode": "Indexed",
        "completions": spec.nodes[1],
        "parallelism": spec.nodes[1],
        "backoffLimit": 0,
        **_given(activeDeadlineSeconds=spec.seconds),
        "podFailurePolicy": {"rules": _PREEMPTED},
        "template": pod,
    }
    policy = {"maxRestarts": spec.requeues, "rules": _REQUEUED if spec.requeues else _NEVER}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "spec": {
            "failurePolicy": policy,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": NODE, "replicas": 1, "template": {"spec": job}}],
        },
    }


_PREEMPTED: list[Tree] = [
    {"action": "FailJob", "onExitCodes": {"containerName": NODE, "operator": "In", "values": [75]}},
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
]
"""A pod that saved and left, or is taken away, ends its Job for the reason `PodFailurePolicy`; nothing else does."""

_NEVER: list[Tree] = [{"name": "failed", "action": "FailJobSet"}]
_REQUEUED: list[Tree] = [
    {"name": "preempted", "action": "RestartJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
    *_NEVER,
]


def _container(spec: JobSpec, settings: KubernetesSettings, folder: str) -> Tree:
    meeting = "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"
    command = elsewhere.command(spec, folder, settings.python, meeting)
    secrets = {name: where.partition("/") for name, where in settings.secrets.items()}
    mounts = [*_mounted(settings, name="run", mountPath=settings.mount), *_shared(settings, mountPath="/dev/shm")]
    return {
        **_given(image=settings.image),
        "command": list(command[:3]),
        "args": [word if word == f"--rdzv-endpoint={meeting}" else literal(word) for word in command[3:]],
        "env": [
            *({"name": name, "value": literal(value)} for name, value in spec.environment.items()),
            *(
                {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
                for name, (secret, _, key) in secrets.items()
            ),
        ],
        "resources": _resources(spec, settings),
        "volumeMounts": mounts,
    }


def _resources(spec: JobSpec, settings: KubernetesSettings) -> Tree:
    """CPUs are a share, never a bound, which would only slow the run; memory and GPUs are both."""
    asked, gpus = spec.resources, settings.gpu_resource
    bound = {**_given(memory=asked.memory), **({gpus: str(asked.gpus)} if asked.gpus else {})}
    return _given(requests={**({"cpu": str(asked.cpus * spec.procs)} if asked.cpus else {}), **bound}, limits=bound)


def _pod(spec: JobSpec, settings: KubernetesSettings, container: Tree) -> Tree:
    volumes = [
        *_mounted(settings, name="run", persistentVolumeClaim={"claimName": settings.volume}),
        *_shared(settings, emptyDir={"medium": "Memory", "sizeLimit": settings.shm}),
    ]
    inside = {
        "containers": [container],
        "terminationGracePeriodSeconds": spec.grace + LIFE_AFTER_GRACE,
        **_given(
            volumes=volumes,
            serviceAccountName=settings.service_account,
            nodeSelector=dict(settings.node_selector),
            tolerations=[dict(one) for one in settings.tolerations],
            imagePullSecrets=[{"name": name} for name in settings.image_pull_secrets],
        ),
    }
    return {**_given(metadata=_given(labels=dict(settings.labels))), "spec": inside}


def _mounted(settings: KubernetesSettings, **volume: Any) -> list[Tree]:
    return [volume] if settings.volume else []


def _shared(settings: KubernetesSettings, **volume: Any) -> list[Tree]:
    return [{"name": "shm", **volume}] if settings.shm else []


def _given(**values: Any) -> Tree:
    """What says something."""
    return {name: value for name, value in values.items() if value}
