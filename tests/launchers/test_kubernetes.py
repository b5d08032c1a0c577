"""What is made for Kubernetes: manifests that the real definitions take, in which every value arrives as it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.definitions import mistakes
from launchers.kubelet import container, expanded, worker
from loomtune.compose import compose
from loomtune.errors import UserError
from loomtune_launchers.kubernetes import manifests
from loomtune_launchers.kubernetes.kubernetes import Kubernetes
from loomtune_launchers.kubernetes.settings import KubernetesSettings

TYPED = ("model=huggingface", "optimizer.lr=1e-3", "launcher=kubernetes", "launcher.nodes=2", "run.dir=/home/me/it")
NASTY = """ a 'b' "c" $(PET_NODE_RANK) $$(x) $HOME `id` ; rm -rf / & | > \\ \n\ttwo: lines # $ é 1e3"""

FULL: dict[str, Any] = {
    "nodes": 4,
    "gpus": 8,
    "cpus": 6,
    "memory": "900Gi",
    "shm": "64Gi",
    "image": "registry.example/loomtune:1",
    "image_pull_secrets": ["registry"],
    "volume": "models",
    "mount": "/mnt/models",
    "service_account": "trainer",
    "node_selector": {"gpu": "h100", "spot": "true"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule", "tolerationSeconds": 30}],
    "labels": {"kueue.x-k8s.io/queue-name": "research", "number": "1e3"},
    "secrets": {"HF_TOKEN": "hugging-face/token"},
    "environment": {"NCCL_DEBUG": "INFO", "Y": "y", "NUMBER": "1e3", "OCTAL": "0o17", "EMPTY": ""},
    "time": 3600,
    "restarts": 2,
    "grace": 90,
}


def launcher(**settings: Any) -> Kubernetes:
    return Kubernetes(KubernetesSettings(**{"volume": "models", "image": "me/loomtune", **settings}))


def manifest(typed: tuple[str, ...] = TYPED, **settings: Any) -> dict[str, Any]:
    made = launcher(**settings)
    job = made.spec(Path("runs/20261122-The_Run"), made.processes(many=True), typed)
    return yaml.safe_load(made.render(job).files["job.yaml"])


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        FULL,
        {"nodes": 2, "procs": 3},
        {"shm": "", "volume": "", "run_dir": "/data/run"},
        {"gpus": 1, "gpu_resource": "amd.com/gpu", "context": "other", "namespace": "team"},
        {"environment": {"A": NASTY}, "grace": 0, "threads": 4},
        {"labels": {"a": "b"}, "memory": "1.5Gi", "job": "mine"},
    ],
)
def test_the_real_definitions_take_what_is_rendered(kind: str, settings: dict[str, Any]) -> None:
    assert mistakes(manifest(kind=kind, **settings)) == []


def test_settings_of_one_kind_alone_are_taken_too() -> None:
    assert mistakes(manifest(kind="jobset", requeues=3)) == []
    named = manifest(kind="trainjob", runtime="mine", runtime_kind="TrainingRuntime", image="")
    assert mistakes(named) == []
    assert named["spec"]["runtimeRef"] == {"name": "mine", "kind": "TrainingRuntime"}
    assert "image" not in named["spec"]["trainer"]


def _change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for step in path[:-1]:
            manifest = manifest[step]
        manifest[path[-1]] = to

    return change


def _take(*path: Any) -> Callable[[dict[str, Any]], None]:
    def take(manifest: dict[str, Any]) -> None:
        for step in path[:-1]:
            manifest = manifest[step]
        del manifest[path[-1]]

    return take


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")
PATCH = (
    "spec",
    "runtimePatches",
    0,
    "trainingRuntimeSpec",
    "template",
    "spec",
    "replicatedJobs",
    0,
    "template",
    "spec",
)


@pytest.mark.parametrize(
    ("kind", "mistake", "said"),
    [
        ("trainjob", _change("spec", "trainer", "numNodes", to="4"), "'4' is not of type 'integer'"),
        ("trainjob", _change("spec", "trainer", "resourcePerNode", to={}), "'resourcePerNode' was unexpected"),
        ("trainjob", _take("spec", "runtimeRef", "name"), "'name' is a required property"),
        ("trainjob", _change("spec", "trainer", "env", 0, "value", to=1), "1 is not of type 'string'"),
        ("trainjob", _change("spec", "activeDeadlineSeconds", to=0), "less than the minimum of 1"),
        ("trainjob", _change("spec", "trainer", "args", to=["x"] * 129), "is too long"),
        (
            "trainjob",
            _change(*PATCH, "template", "spec", "restartPolicy", to="Never"),
            "'restartPolicy' was unexpected",
        ),
        ("trainjob", _change("metadata", "name", to="The_Run"), "does not match"),
        ("jobset", _change("spec", "failurePolicy", "rules", 0, "action", to="Restart"), "'Restart' is not one of"),
        ("jobset", _change(*JOB, "completionmode", to="Indexed"), "'completionmode' was unexpected"),
        ("jobset", _change(*POD, "tolerations", 0, "seconds", to=3), "'seconds' was unexpected"),
        ("jobset", _take(*POD, "containers"), "'containers' is a required property"),
        (
            "jobset",
            _change(*POD, "volumes", 0, "persistentVolumeClaim", "claimName", to=None),
            "is not of type 'string'",
        ),
        ("jobset", _change("apiVersion", to="jobset.x-k8s.io/v1"), "was expected"),
    ],
)
def test_a_planted_mistake_is_caught(kind: str, mistake: Callable[[dict[str, Any]], None], said: str) -> None:
    sound = manifest(kind=kind, **FULL)
    faulty = copy.deepcopy(sound)
    mistake(faulty)
    assert mistakes(sound) == []
    (found,) = mistakes(faulty)
    assert said in found


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
def test_values_arrive_as_they_were_typed(kind: str) -> None:
    typed = (*TYPED, f"run.name={NASTY}", "data.path=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)", "x=$$ ${local_rank}")
    made = manifest(typed, kind=kind, environment={"NASTY": NASTY}, restarts=1)
    command, environment = expanded(made, node=1)
    kept = [text for text in typed if not text.startswith(("launcher", "run.dir"))]
    assert worker(command)[:-2] == kept
    assert environment["NASTY"] == NASTY
    address = environment["PET_MASTER_ADDR"]
    assert f"--rdzv-endpoint={address}:29500" in command, "what is ours to be filled in is filled in"


def test_no_text_can_be_taken_for_a_number_or_a_truth() -> None:
    said = manifests.text(manifest(kind="jobset", **FULL))
    for text in ("1e3", "y", "0o17", "", "true"):
        assert re.search(rf": (['\"]){re.escape(text)}\1$", said, re.MULTILINE), text


def test_the_job_composes_from_what_was_typed_but_where_it_runs(tmp_path: Path) -> None:
    (command, _) = expanded(manifest(), node=0)
    overrides = worker(command)
    assert overrides[:2] == ["model=huggingface", "optimizer.lr=1e-3"]
    plan = compose(overrides)
    assert plan.chosen("launcher")["name"] == "local"
    assert plan.root.run.dir == "/loomtune/runs/loomtune-20261122-the-run"
    assert plan.hash == compose(["model=huggingface", "optimizer.lr=1e-3"]).hash


def test_a_value_that_refers_to_the_launcher_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.name=<value>"):
        manifest((*TYPED, "run.name=${launcher.image}"))


def test_a_pod_has_what_was_asked_for() -> None:
    made = manifest(kind="jobset", **FULL)
    pod, node = made["spec"]["replicatedJobs"][0]["template"]["spec"], container(made)
    assert pod["completions"] == pod["parallelism"] == 4
    assert node["resources"]["limits"] == {"memory": "900Gi", "nvidia.com/gpu": "8"}
    assert node["resources"]["requests"] == {"cpu": "48", "memory": "900Gi", "nvidia.com/gpu": "8"}
    _, environment = expanded(made, node=3)
    assert environment["PET_NODE_RANK"] == "3"
    assert environment["PET_NPROC_PER_NODE"] == "8"
    assert environment["PET_MASTER_ADDR"] == "loomtune-20261122-the-run-node-0-0.loomtune-20261122-the-run"
    assert environment["OMP_NUM_THREADS"] == "6"
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert pod["template"]["spec"]["terminationGracePeriodSeconds"] > 90


def test_only_a_preempted_jobset_is_started_again() -> None:
    made = manifest(kind="jobset", requeues=3)["spec"]
    again, last = made["failurePolicy"]["rules"]
    assert made["failurePolicy"]["maxRestarts"] == 3
    assert (again["action"], again["onJobFailureReasons"]) == ("RestartJobSet", ["PodFailurePolicy"])
    assert last == {"name": "failed", "action": "FailJobSet"}, "a rule without a condition is for all that is left"
    job = made["replicatedJobs"][0]["template"]["spec"]
    codes, taken = job["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == [75]
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never", "or a pod is started again before its policy is asked"
    assert manifest(kind="jobset")["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert [rule["action"] for rule in manifest(kind="jobset", requeues=0)["spec"]["failurePolicy"]["rules"]] == [
        "FailJobSet"
    ]


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"volume": ""}, r"launcher\.volume"),
        ({"run_dir": "/elsewhere/run"}, "in /loomtune"),
        ({"run_dir": "/loomtune/../etc"}, "plain absolute path"),
        ({"run_dir": "/loomtune/it's"}, "plain absolute path"),
        ({"kind": "pod"}, "trainjob or jobset"),
        ({"kind": "jobset", "image": ""}, r"launcher\.image"),
        ({"kind": "jobset", "runtime": "torch"}, r"launcher\.kind=trainjob"),
        ({"requeues": 1}, r"launcher\.kind=jobset"),
        ({"memory": "64GB"}, r"launcher\.memory=64Gi"),
        ({"nodes": 0}, r"launcher\.nodes=1"),
        ({"requeues": -1, "kind": "jobset"}, r"launcher\.requeues=1"),
        ({"time": -1}, r"launcher\.time=1"),
        ({"mount": "relative"}, r"launcher\.mount=/loomtune"),
        ({"secrets": {"A": "token"}}, r"launcher\.secrets\.A=SECRET/KEY"),
        ({"secrets": {"A": "b/c"}, "environment": {"A": "d"}}, "leave one of them out"),
        ({"environment": {"PET_NODE_RANK": "1"}}, "leave PET_NODE_RANK out"),
        ({"environment": {"no-name": "1"}}, "letters, digits"),
        ({"tolerations": [{"kee": "x"}]}, "effect, key"),
        ({"job": "The_Run"}, r"launcher\.job"),
        ({"job": "a" * 41}, r"launcher\.job"),
        ({"procs": "many"}, r"launcher\.procs"),
        ({"runtime_kind": "Runtime"}, "TrainingRuntime"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(settings: dict[str, Any], cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        launcher(**settings)


def test_a_trainjob_takes_128_arguments() -> None:
    many = tuple(f"a{i}=1" for i in range(130))
    with pytest.raises(UserError, match=r"launcher\.kind=jobset"):
        manifest(many)
    assert mistakes(manifest(many, kind="jobset")) == []


@pytest.mark.parametrize(
    ("run", "name"),
    [("runs/The_Run 1", "loomtune-the-run-1"), ("x" * 90, "loomtune-" + "x" * 31), ("été--", "loomtune-t")],
)
def test_a_job_is_named_after_its_run_as_dns_allows(run: str, name: str) -> None:
    assert launcher().spec(Path(run), 1).name == name


def test_processes_are_one_for_each_gpu() -> None:
    assert launcher(gpus=8, nodes=2).processes(many=True) == 16
    assert launcher(gpus=8).processes(many=False) == 1
    assert launcher(nodes=2, procs=3).processes(many=True) == 6


def test_kubectl_is_told_where() -> None:
    made = launcher(context="lab", namespace="team")
    (command,) = made.render(made.spec(Path("/r"), 1)).commands
    assert command == ("kubectl", "--context=lab", "--namespace=team", "create", "-f", "/r/job.yaml")
