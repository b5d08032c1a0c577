"""A real Ray cluster on this machine: two workers train one run, and nothing outlives its launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from loomtune import api
from loomtune.errors import Preempted
from runs.curves import agree
from runs.processes import COMMAND, started, wait_for_step
from runs.worlds import Outcome, maths

pytestmark = pytest.mark.slow

LONG = 150.0
"""Seconds until what is waited for counts as hanging."""

SOON = 20.0
"""Seconds in which what a killed launcher had started must be gone; Ray itself takes some to see that it is."""

CLUSTER = """
import json, os, sys
from ray.cluster_utils import Cluster
small = {"object_store_memory": 80_000_000}
head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": sys.argv[1], **small}
cluster = Cluster(initialize_head=True, head_node_args=head)
workers = [cluster.add_node(num_cpus=2, **small) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "lose\\n":
        cluster.remove_node(workers.pop(), allow_graceful=False)
    if line == "mend\\n":
        workers.append(cluster.add_node(num_cpus=2, **small))
cluster.shutdown()
"""


class Cluster:
    """A head without room and two workers with room for two processes each.

    In a process of its own, since Ray takes over the signals of the process that starts a node; it ends with its input.
    """

    def __init__(self, folder: str) -> None:
        command = [sys.executable, "-c", CLUSTER, folder]
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        self._all = set(psutil.Process(self._process.pid).children(recursive=True))

    def lose(self) -> None:
        """Kills a worker, as a loss of power does."""
        assert self._process.stdin is not None
        print("lose", file=self._process.stdin, flush=True)

    def mend(self) -> None:
        """Adds a worker again."""
        self._all |= set(psutil.Process(self._process.pid).children(recursive=True))
        assert self._process.stdin is not None
        print("mend", file=self._process.stdin, flush=True)

    def close(self) -> None:
        """Ends it. Fails where a process is left."""
        self._all |= set(psutil.Process(self._process.pid).children(recursive=True))
        self._process.communicate(timeout=LONG)
        _, alive = psutil.wait_procs(self._all, timeout=SOON)
        for process in alive:
            process.kill()
        assert not alive, alive


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="needs loomtune[ray]")
    folder = tempfile.mkdtemp(prefix="ray")  # a short path: sockets lie in it
    made = Cluster(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


def of_run(folder: Path) -> list[psutil.Process]:
    """All processes of this machine that were told of the run's folder: launcher, agents and ranks."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait(until: Callable[[], bool], seconds: float = LONG) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < seconds, "it did not come to pass"
        time.sleep(0.1)


def train(cluster: Cluster, folder: Path, settings: list[str], *more: str, nodes: str = "2") -> list[str]:
    launcher = ["launcher=ray", f"launcher.address={cluster.address}", f"launcher.nodes={nodes}", "launcher.grace=20"]
    return [*COMMAND, "train", *settings, "sharding=fsdp", *launcher, f"run.dir={folder}", *more]


def test_two_workers_train_with_the_losses_of_one_process(
    cluster: Cluster, tiny: list[str], alone: Callable[..., Outcome], tmp_path: Path
) -> None:
    settings = [*tiny, "objective=sft", "steps=6"]
    settings[settings.index("tracker=[jsonl]")] = "tracker=[jsonl,console]"
    done = subprocess.run(
        train(cluster, tmp_path / "run", settings),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    agree(Outcome(tmp_path / "run", {}), alone(*settings))
    assert "2 x 1 processes on" in done.stderr
    assert "loss" in done.stdout + done.stderr, "the first rank speaks on the terminal"
    launcher = api.launched(tmp_path / "run")
    assert launcher.status(tmp_path / "run").state == "completed"
    assert any(" rank 0 " in line for line in launcher.logs(tmp_path / "run"))
    wait(lambda: not of_run(tmp_path / "run"), SOON)


def test_nothing_outlives_a_killed_launcher(cluster: Cluster, tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(train(cluster, folder, tiny, "steps=100000"), tmp_path / "log") as process:
        wait_for_step(folder, 3, process)
        assert len(of_run(folder)) >= 5, "the launcher, two agents and two ranks"
        assert api.launched(folder).status(folder).state == "running"
        process.kill()
        process.wait()
        wait(lambda: not of_run(folder), SOON)
        assert api.launched(folder).status(folder).state in ("failed", "preempted")


def test_a_run_that_is_cancelled_from_elsewhere_keeps_its_last_checkpoint(
    cluster: Cluster, tiny: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with started(train(cluster, folder, tiny, "steps=100000", "launcher.requeues=3"), tmp_path / "log") as process:
        wait_for_step(folder, 3, process)
        api.launched(folder).cancel(folder)
        assert process.wait(LONG) == Preempted.exit_code, (tmp_path / "log").read_text()
        assert json.loads((folder / "result.json").read_text())["status"] == "preempted"
        assert (folder / "checkpoints" / "LATEST").exists()
        assert "placed anew" not in (tmp_path / "log").read_text()
        wait(lambda: not of_run(folder), SOON)


def test_a_run_that_others_asked_to_leave_is_placed_anew_and_asked_by_us_it_is_not(
    cluster: Cluster, tiny: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with started(train(cluster, folder, tiny, "steps=100000", "launcher.requeues=1"), tmp_path / "log") as process:
        wait_for_step(folder, 3, process)
        (folder / "stop").touch()
        wait(lambda: "placed anew" in (tmp_path / "log").read_text())
        kept = maths(folder)[-1]["step"]
        wait_for_step(folder, kept + 3, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == Preempted.exit_code, (tmp_path / "log").read_text()
        steps = [line["step"] for line in maths(folder)]
        assert steps == list(range(1, len(steps) + 1)), "no step was lost and none was made twice"
        wait(lambda: not of_run(folder), SOON)


def test_a_lost_node_is_named_and_the_run_goes_on_with_what_is_left(
    cluster: Cluster, tiny: list[str], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    more = ["launcher.patience=5", "launcher.requeues=1", "checkpoint.every=5", "steps=200"]
    with started(train(cluster, folder, tiny, *more, nodes="1:2"), log) as process:
        wait_for_step(folder, 12, process)
        cluster.lose()
        code = process.wait(LONG)
        cluster.mend()
        assert code == 0, log.read_text()
        assert " was lost: " in log.read_text() and "1 x 1 processes on" in log.read_text()
        assert json.loads((folder / "result.json").read_text())["status"] == "completed"
        wait(lambda: not of_run(folder), SOON)


ELSEWHERE = """
import sys
from pathlib import Path
from loomtune_launchers.ray.ray import Ray
from loomtune_launchers.ray.settings import RaySettings
folder, launcher = Path(sys.argv[1]), Ray(RaySettings(address=sys.argv[2]))
launcher.settings.grace = -10
print(launcher.status(folder).state)
launcher.cancel(folder)
print(launcher.status(folder).state)
"""
"""Waits for no launcher: it is as if that had not reacted."""


def test_from_another_machine_ray_is_asked_and_told(cluster: Cluster, tiny: list[str], tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    with started(train(cluster, folder, tiny, "steps=100000"), tmp_path / "log") as process:
        wait_for_step(folder, 3, process)
        other.mkdir()
        record = json.loads((folder / "launcher.json").read_text())
        (other / "launcher.json").write_text(json.dumps({**record, "host": "elsewhere"}))
        command = [sys.executable, "-c", ELSEWHERE, str(other), cluster.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)
        assert done.stdout.split() == ["running", "cancelled"], done.stderr
        assert process.wait(LONG) != 0 and " was lost: " in (tmp_path / "log").read_text()
        wait(lambda: not of_run(folder), SOON)


def test_a_cluster_without_room_says_what_it_has(cluster: Cluster, tiny: list[str], tmp_path: Path) -> None:
    command = train(cluster, tmp_path / "run", tiny, "launcher.cpus=64", "launcher.patience=1", "steps=1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 2 and "no room for 2 nodes" in done.stderr and "launcher.nodes" in done.stderr
