"""The container of the rendered manifest, in two namespaces for two pods, with what Kubeflow would set."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from labs.netns import Nodes, nodes, wait_for
from launchers.kubelet import expanded
from loomtune.compose import quoted
from loomtune.plan import Plan
from loomtune_launchers import elsewhere
from loomtune_launchers.kubernetes.kubernetes import Kubernetes
from loomtune_launchers.kubernetes.settings import KubernetesSettings
from runs.worlds import maths

NASTY = """ a 'b' "c" $(PET_NODE_RANK) $$(x) $HOME `id` ; & | > \\ \n\ttwo: lines # é"""

SETTINGS = ["optimizer.lr=1e-3", "tracker=[jsonl]", "steps=4", "checkpoint.background=false"]


@pytest.fixture(scope="module")
def pods() -> Iterator[Nodes]:
    with nodes(2, prefix="labd", net="10.84.0") as made:
        yield made


@pytest.fixture(scope="module")
def typed(tied_model: Path, mixed_data: Path) -> list[str]:
    return [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", *SETTINGS]


@pytest.fixture(scope="module")
def alone(pods: Nodes, typed: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of one process."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "loomtune.train", *typed, f"run.dir={folder / 'run'}"]
    assert wait_for(pods.run(0, command, log=folder / "log")) == [0], (folder / "log").read_text()
    return maths(folder / "run")


def start(pods: Nodes, volume: Path, typed: list[str], **settings: Any) -> tuple[list[int], Path]:
    """Runs both pods of a manifest to their end. The volume is a folder; what the image has is this interpreter."""
    place = {"volume": "models", "mount": str(volume), "image": "me/loomtune", "python": sys.executable, "nodes": 2}
    launcher = Kubernetes(KubernetesSettings(**place, **settings))
    job = launcher.spec(Path("runs/mine"), launcher.processes(many=True), [*typed, "launcher=kubernetes"])
    manifest = yaml.safe_load(launcher.render(job).files["job.yaml"])
    started = []
    for node in range(2):
        command, environment = expanded(manifest, node, head=pods.host(0))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        started.append(pods.run(node, command, environment, volume / f"log-{node}"))
    return wait_for(*started), volume / "runs" / "loomtune-mine"


@pytest.mark.parametrize(("kind", "procs"), [("trainjob", 1), ("jobset", 2)])
def test_two_pods_train_as_one_process_does(
    kind: str, procs: int, pods: Nodes, typed: list[str], alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    environment = {"NASTY": NASTY}
    more = ["sharding=ddp", f"run.name={quoted(NASTY)}"]
    codes, run = start(pods, tmp_path, [*typed, *more], kind=kind, procs=procs, environment=environment)
    said = [(tmp_path / f"log-{node}").read_text() for node in range(2)]
    assert codes == [0, 0], said
    lines = maths(run)
    assert [line["step"] for line in lines] == [line["step"] for line in alone] == [1, 2, 3, 4]
    for key, bound in (("loss", 2e-6), ("grad_norm", 1e-5)):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in alone], rel=bound)
    assert Plan.load(run).root.run.name == NASTY
    assert elsewhere.result(said[0].splitlines()) == json.loads((run / "result.json").read_text())
    assert elsewhere.result(said[1].splitlines()) is None, "one pod alone says it"
    assert pods.left(patience=10) == {}


def test_a_mistake_of_the_users_ends_every_pod_with_2(pods: Nodes, typed: list[str], tmp_path: Path) -> None:
    codes, _ = start(pods, tmp_path, [*typed, "optimizer.learning_rate=1"], kind="jobset")
    assert codes == [2, 2], "which the pods' policy does not take for a preemption"
    assert pods.left(patience=10) == {}


def test_a_preempted_job_ends_with_75_everywhere_and_goes_on_where_it_was(
    pods: Nodes, typed: list[str], alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(EVICTED)
    place = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    more = [*typed, "sharding=ddp"]
    codes, run = start(pods, tmp_path, more, kind="jobset", requeues=1, environment=place)
    said = [(tmp_path / f"log-{node}").read_text() for node in range(2)]
    assert codes == [75, 75], said
    assert json.loads((run / "result.json").read_text())["status"] == "preempted", said
    assert (elsewhere.result(said[0].splitlines()) or {})["status"] == "preempted"
    (tmp_path / "sitecustomize.py").unlink()
    codes, run = start(pods, tmp_path, more, kind="jobset", requeues=1, environment=place)
    assert codes == [0, 0]
    assert [line["loss"] for line in maths(run)] == pytest.approx([line["loss"] for line in alone], rel=2e-6)
    assert pods.left(patience=10) == {}


def test_a_killed_rank_is_started_again_within_the_pods(
    pods: Nodes, typed: list[str], alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    more = ["sharding=ddp", "checkpoint.every=1"]
    killer = tmp_path / "sitecustomize.py"
    killer.write_text(KILLER)
    place = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    codes, run = start(pods, tmp_path, [*typed, *more], restarts=2, environment=place)
    assert codes == [0, 0], [(tmp_path / f"log-{node}").read_text() for node in range(2)]
    assert (tmp_path / "killed").is_file()
    assert [line["loss"] for line in maths(run)] == pytest.approx([line["loss"] for line in alone], rel=2e-6)
    assert pods.left(patience=10) == {}


KILLER = """
import os, pathlib, signal, threading, time
here = pathlib.Path(__file__).parent

def watch():
    while not list(here.glob("runs/*/checkpoints/step-*/manifest.json")):
        time.sleep(0.01)
    (here / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") == "1" and not (here / "killed").exists():
    threading.Thread(target=watch, daemon=True).start()
"""

EVICTED = """
import os, pathlib, signal, threading, time
here = pathlib.Path(__file__).parent

def watch():
    while not [path for path in here.glob("runs/*/metrics.jsonl") if path.stat().st_size]:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)

if "RANK" not in os.environ and os.environ.get("PET_NODE_RANK") == "1":
    threading.Thread(target=watch, daemon=True).start()
"""
"""The second pod is asked to leave, as a kubelet asks: its first process gets the signal."""
