"""What a kubelet and Kubeflow's controller make of a manifest's container."""

from __future__ import annotations

from string import Template
from typing import Any


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    """The container that trains."""
    if manifest["kind"] == "TrainJob":
        return manifest["spec"]["trainer"]
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def expanded(manifest: dict[str, Any], node: int, head: str = "") -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a node's container.

    head: the first node's name where there is no DNS of the cluster's.
    """
    found, environment = container(manifest), dict[str, str]()
    for variable in [*found["env"], *_injected(manifest)]:
        if "value" in variable:
            environment[variable["name"]] = _expand(variable["value"], environment)
        elif "fieldRef" in variable["valueFrom"]:
            assert "job-completion-index" in variable["valueFrom"]["fieldRef"]["fieldPath"]
            environment[variable["name"]] = str(node)
        else:
            environment[variable["name"]] = "hidden"
    if head:
        environment["PET_MASTER_ADDR"] = head
    words = [*found["command"], *found["args"]]
    return [_expand(word, environment) for word in words], environment


def worker(command: list[str]) -> list[str]:
    """The arguments of a rank: torchrun's templates are filled in (`torch.distributed.elastic.utils.api.macros`)."""
    return [Template(word).safe_substitute(local_rank="0") for word in command[command.index("loomtune.train") + 1 :]]


def _injected(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What Kubeflow Trainer's torch plugin adds (`pkg/runtime/framework/plugins/torch`); to a JobSet, nobody does."""
    if manifest["kind"] != "TrainJob":
        return []
    name, trainer = manifest["metadata"]["name"], manifest["spec"]["trainer"]
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return [
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_NODE_RANK", "valueFrom": index},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]


def _expand(text: str, environment: dict[str, str]) -> str:
    """Kubernetes' expansion: `$(NAME)` where it is known, `$$` is `$`, and all else stays.

    After `third_party/forked/golang/expansion` of Kubernetes: its rules, not its code.
    """
    made, at = "", 0
    while at < len(text):
        rest = text[at:]
        if rest.startswith("$$"):
            made, at = made + "$", at + 2
        elif rest.startswith("$(") and ")" in rest:
            name = rest[2 : rest.index(")")]
            made, at = made + environment.get(name, f"$({name})"), at + len(name) + 3
        else:
            made, at = made + rest[0], at + 1
    return made
