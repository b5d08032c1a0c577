"""launcher=ray without a cluster: what is asked of Ray, what an actor does, and when a run is placed anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from loomtune.contracts import JobSpec
from loomtune.errors import RunFailed, UserError
from loomtune_launchers import jobs, torchrun
from loomtune_launchers.ray import group
from loomtune_launchers.ray import node as ray_node
from loomtune_launchers.ray import ray as launchers
from loomtune_launchers.ray.ray import Ray
from loomtune_launchers.ray.settings import RaySettings

PATIENCE = 60.0


def launcher(**settings: Any) -> Ray:
    return Ray(RaySettings(**settings))


def wait(until: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < PATIENCE, "it did not come to pass"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("settings", "many", "world"),
    [
        ({}, True, 1),
        ({"nodes": 3}, True, 3),
        ({"nodes": 2, "gpus": 4}, True, 8),
        ({"nodes": 2, "gpus": 4}, False, 2),
        ({"nodes": 2, "gpus": 4, "procs": 3}, True, 6),
        ({"nodes": "1:4", "gpus": 4}, True, 0),
    ],
)
def test_the_world_is_as_large_as_what_is_asked_for(settings: dict[str, Any], many: bool, world: int) -> None:
    assert launcher(**settings).processes(many) == world


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"nodes": "4:1"}, r"launcher\.nodes=2"),
        ({"procs": "all"}, r"launcher\.procs=auto"),
        ({"memory": "much"}, r"launcher\.memory=64G"),
        ({"strategy": "SCATTER"}, "STRICT_SPREAD"),
        ({"cpus": 0}, r"launcher\.cpus=1"),
        ({"gpus": -1}, r"launcher\.gpus=1"),
        ({"patience": -1}, r"launcher\.patience=1"),
        ({"requeues": -1}, r"launcher\.requeues=1"),
        ({"grace": -1}, r"launcher\.grace=1"),
        ({"address": "ray://head:10001"}, "ray job submit"),
    ],
)
def test_what_cannot_be_asked_of_ray_is_refused(settings: dict[str, Any], cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        launcher(**settings)


def test_a_bundle_has_room_for_all_processes_of_a_node(tmp_path: Path) -> None:
    made = launcher(nodes=2, gpus=4, cpus=6, memory="64GiB", strategy="PACK", threads=3, requeues=2)
    job = made.spec(tmp_path / "run", 8)
    assert (job.procs, job.nodes, job.requeues, job.environment["OMP_NUM_THREADS"]) == (4, (2, 2), 2, "3")
    asked = json.loads(made.render(job).files["ray.json"])
    assert asked == {"bundle": {"CPU": 24, "GPU": 4, "memory": 64 * 2**30}, "strategy": "PACK"}
    assert jobs.read(made.render(job).files["job.json"]) == job


def test_threads_are_the_cpus_that_ray_sets_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launcher(cpus=6, gpus=2).spec(Path("run"), 2).environment["OMP_NUM_THREADS"] == "6"


def test_rendering_is_pure_and_shows_what_each_node_runs(tmp_path: Path) -> None:
    made = launcher(nodes=2)
    job = made.spec(tmp_path / "run", 2)
    once, again = made.render(job), made.render(job)
    assert once == again and not list(tmp_path.iterdir())
    first, second = once.commands
    assert "--rdzv-conf=is_host=true" in first and "--rdzv-conf=is_host=false" in second
    assert "--rdzv-endpoint=FIRST:FREE-PORT" in first and "--nproc-per-node=1" in second


def test_what_ray_tells_its_workers_does_not_reach_the_ranks_but_their_devices_do() -> None:
    outer = {"RAY_JOB_ID": "1", "PYTHONBREAKPOINT": "ray.util.rpdb.set_trace", "OMP_NUM_THREADS": "8", "PATH": "/bin"}
    assert ray_node.inherited(outer | {"CUDA_VISIBLE_DEVICES": "2,3"}) == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "2,3",
    }


AGENT = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def asked(number, frame):
    with (folder / "asked").open("a") as file:
        file.write("asked\\n")
    if (folder / "leaves").exists():
        sys.exit(75)
signal.signal(signal.SIGTERM, asked)
child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdin=subprocess.DEVNULL)
print("this is rank 0", flush=True)
print("a warning", file=sys.stderr, flush=True)
(folder / "pids.new").write_text(f"{os.getpid()} {child.pid}")
(folder / "pids.new").rename(folder / "pids")
while True:
    time.sleep(0.02)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run's folder; the agent is a module that needs no torch."""
    (tmp_path / "patient.py").write_text(AGENT)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(torchrun, "command", lambda spec, _: (sys.executable, "-m", "patient", *spec.arguments))
    yield tmp_path
    with suppress(FileNotFoundError):
        for pid in (tmp_path / "pids").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def begun(folder: Path) -> tuple[ray_node.Node, list[psutil.Process]]:
    """A node whose agent has started, and the processes of it."""
    node = ray_node.Node()
    node.start(jobs.text(JobSpec(run=folder, arguments=(str(folder),))), {"endpoint": "", "attempt": ""}, "/")
    wait((folder / "pids").exists)
    return node, [psutil.Process(int(pid)) for pid in (folder / "pids").read_text().split()]


def heard(node: ray_node.Node) -> tuple[set[tuple[bool, str]], int | None]:
    said: list[tuple[bool, str]] = []
    while True:
        more, code = node.hear(0.2)
        said += more
        if code is not None or len(said) == 2:
            return set(said), code


def test_what_an_agent_says_is_handed_on_and_it_is_asked_to_leave_once(folder: Path) -> None:
    (folder / "leaves").touch()
    node, _ = begun(folder)
    assert heard(node) == ({(False, "this is rank 0\n"), (True, "a warning\n")}, None)
    node.stop()
    assert heard(node)[1] == 75
    assert (folder / "asked").read_text() == "asked\n"
    node.stop()
    node.end()


def test_what_does_not_leave_is_ended_with_all_below_it(folder: Path) -> None:
    node, processes = begun(folder)
    node.end()
    gone, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    assert len(gone) == 2 and not alive


ACTOR = """
import sys, time
from loomtune.contracts import JobSpec
from pathlib import Path
from loomtune_launchers import jobs, torchrun
from loomtune_launchers.ray import node as ray_node
torchrun.command = lambda spec, _: (sys.executable, "-m", "patient", *spec.arguments)
ray_node.Node().start(jobs.text(JobSpec(run=Path(sys.argv[1]), arguments=(sys.argv[1],))),
                      {"endpoint": "", "attempt": ""}, "/")
time.sleep(600)
"""


def test_an_agent_is_asked_to_leave_when_its_actor_is_gone(folder: Path) -> None:
    actor = subprocess.Popen([sys.executable, "-c", ACTOR, str(folder)])
    wait((folder / "pids").exists)
    actor.kill()
    actor.wait()
    wait((folder / "asked").exists)


def test_an_agent_does_not_start_when_its_actor_is_gone_already() -> None:
    command = [sys.executable, "-m", "loomtune_launchers.ray.node", "1", sys.executable, "-c", "print('started')"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_run_is_seen_where_its_record_speaks_of_this_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_node, "VISIBLE", 0.0)
    jobs.note(tmp_path, "ray", attempt="now")
    assert ray_node._sees(tmp_path, "now")
    assert not ray_node._sees(tmp_path, "later") and not ray_node._sees(tmp_path / "absent", "now")


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What becomes of each start: a status, or the nodes that were lost. Those that happen are taken away."""
    ends: list[Any] = []

    def attempt(self: Ray, spec: JobSpec, name: str, asked: Any) -> list[str]:
        end = ends.pop(0)
        if isinstance(end, str):
            result = {"status": end, "step": 3, "error": "peer gone" if end == "failed" else None}
            (spec.run / "result.json").write_text(json.dumps(result))
        return end if isinstance(end, list) else []

    monkeypatch.setattr(Ray, "_attempt", attempt)
    monkeypatch.setattr(group, "connected", lambda address: nullcontext())
    return ends


@pytest.mark.parametrize(
    ("ends", "left"),
    [
        (["completed", "completed"], 1),
        (["failed", "completed"], 1),
        (["preempted", "completed"], 0),
        ([["loom was lost"], "completed"], 0),
        (["preempted", "preempted", "preempted", "completed"], 1),
    ],
)
def test_a_run_is_placed_anew_where_that_helps(ends: list[Any], left: int, attempts: list[Any], tmp_path: Path) -> None:
    attempts += ends
    made = launcher(requeues=2)
    made.submit(made.spec(tmp_path, 1))
    assert len(attempts) == left
    assert jobs.noted(tmp_path, "ray")["over"]


def test_a_cancelled_run_is_not_placed_anew(
    attempts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts += ["preempted", "completed"]
    inner = Ray._attempt

    def cancelled(self: Ray, spec: JobSpec, name: str, asked: Any) -> list[str]:
        (spec.run / jobs.CANCELLED).touch()
        return inner(self, spec, name, asked)

    monkeypatch.setattr(Ray, "_attempt", cancelled)
    made = launcher(requeues=2)
    made.submit(made.spec(tmp_path, 1))
    assert len(attempts) == 1
    assert made.status(tmp_path).state == "cancelled"


def test_a_lost_node_is_the_cause_of_what_the_others_say(attempts: list[Any], tmp_path: Path) -> None:
    made = launcher()
    with pytest.raises(RunFailed, match="loom was lost"):
        attempts.append(["loom was lost"])
        made.submit(made.spec(tmp_path, 1))
    (tmp_path / "result.json").write_text(json.dumps({"status": "failed", "step": 3, "error": "peer gone"}))
    launchers._explain(tmp_path, [], False)
    assert made.status(tmp_path).detail == "peer gone"
    launchers._explain(tmp_path, ["loom was lost"], False)
    assert made.status(tmp_path).detail == "loom was lost; after it: peer gone"


def test_the_status_is_that_of_the_launching_process_until_it_is_over(tmp_path: Path) -> None:
    made = launcher()
    made._note(tmp_path, "now", state="pending")
    assert made.status(tmp_path).state == "pending"
    made._note(tmp_path, "now", group="room")
    assert made.status(tmp_path).state == "running"
    made._note(tmp_path, "now", over=True)
    assert made.status(tmp_path).state == "failed"
