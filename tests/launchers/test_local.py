"""This machine: how many processes, what they are given, and that none outlives the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from loomtune.contracts import JobSpec
from loomtune.errors import UserError
from loomtune_launchers import local
from loomtune_launchers.local import Local
from loomtune_launchers.settings import LocalSettings

PATIENCE = 60.0


def launcher(**settings: object) -> Local:
    return Local(LocalSettings(**settings))


@pytest.mark.parametrize(
    ("gpus", "cores", "many", "expected"), [(0, 8, True, 2), (0, 1, True, 1), (4, 8, True, 4), (4, 8, False, 1)]
)
def test_auto_is_one_for_each_gpu_or_up_to_2_on_a_cpu_if_the_sharding_can_use_them(
    gpus: int, cores: int, many: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_gpus", lambda: gpus)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert launcher().processes(many) == expected
    assert launcher(procs=5).processes(many) == 5


@pytest.mark.parametrize(("visible", "expected"), [(None, 3), ("", 0), ("1", 1), ("0,2", 2), ("0,1,2,3", 3)])
def test_only_gpus_that_may_be_used_count(visible: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path(str(n)) for n in range(3)]))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local._gpus() == expected


@pytest.mark.parametrize("procs", [0, -1, "all", "2"])
def test_a_number_of_processes_that_is_none_is_refused(procs: object) -> None:
    with pytest.raises(UserError, match=r"launcher\.procs=auto or 1, 2"):
        launcher(procs=procs)


@pytest.mark.parametrize(
    ("settings", "outer", "threads"),
    [
        ({}, None, "4"),
        ({}, "3", "3"),
        ({"threads": 5}, "3", "5"),
        ({"environment": {"OMP_NUM_THREADS": "7"}}, "3", "7"),
    ],
)
def test_cores_are_shared_out_unless_told_otherwise(
    settings: dict[str, object], outer: str | None, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if outer:
        monkeypatch.setenv("OMP_NUM_THREADS", outer)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert launcher(**settings).spec(Path("run"), 2).environment["OMP_NUM_THREADS"] == threads


def test_rendering_is_pure_and_is_what_is_run(tmp_path: Path) -> None:
    job = launcher(restarts=2, grace=9).spec(tmp_path / "run", 2)
    assert (job.procs, job.restarts, job.grace) == (2, 2, 9)
    once, again = launcher().render(job), launcher().render(job)
    assert once == again and not list(tmp_path.iterdir())
    (command,) = once.commands
    assert "--nproc-per-node=2" in command and command[-1] == str(tmp_path / "run")


def test_the_status_is_that_of_the_result_and_before_it_of_the_process(tmp_path: Path) -> None:
    assert launcher().status(tmp_path).state == "failed"
    (tmp_path / "launcher.json").write_text(json.dumps({"pid": os.getpid()}))
    assert launcher().status(tmp_path).state == "running"
    (tmp_path / "result.json").write_text(json.dumps({"status": "completed"}))
    assert launcher().status(tmp_path).state == "completed"


def test_logs_are_all_ranks_lines(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / "logs" / "attempt" / rank).mkdir(parents=True)
        (tmp_path / "logs" / "attempt" / rank / "stderr.log").write_text(f"rank {rank}\n")
    assert list(launcher().logs(tmp_path)) == ["rank 0", "rank 1"]


WORKER = """
import os, signal, sys, time
from pathlib import Path
from loomtune.signals import die_with_parent
die_with_parent()
folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
def asked(number, frame):
    with (folder / f"asked.{rank}").open("a") as file:
        file.write(f"{number}\\n")
    if (folder / "leaves").exists():
        (folder / f"left.{rank}").touch()
        os._exit(0)
signal.signal(signal.SIGTERM, asked)
(folder / f"pid.{rank}.new").write_text(str(os.getpid()))
(folder / f"pid.{rank}.new").rename(folder / f"pid.{rank}")
while True:
    time.sleep(0.05)
"""

LAUNCH = """
import sys
from pathlib import Path
from loomtune.contracts import JobSpec
from loomtune_launchers.local import Local
from loomtune_launchers.settings import LocalSettings
job = JobSpec(run=Path(sys.argv[1]), module="patient_rank", procs=int(sys.argv[2]), grace=int(sys.argv[3]))
Local(LocalSettings()).submit(job)
"""


@contextmanager
def launched(
    folder: Path, procs: int, grace: int = 30
) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A launcher in a process of its own, and its ranks, which have started and would never end."""
    (folder / "patient_rank.py").write_text(WORKER)
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths}
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(folder), str(procs), str(grace)], env=environment, stderr=log, stdout=log
    )
    ranks: list[psutil.Process] = []
    try:
        wait(lambda: process.poll() is not None or len(list(folder.glob("pid.?"))) == procs)
        assert process.poll() is None, (folder / "log").read_text()
        ranks = [psutil.Process(int(path.read_text())) for path in folder.glob("pid.?")]
        yield process, ranks
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
        process.kill()
        process.wait()


def wait(until: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < PATIENCE, "it did not come to pass"
        time.sleep(0.02)


@pytest.mark.parametrize("procs", [1, 2])
def test_no_rank_outlives_a_launcher_that_is_killed(procs: int, tmp_path: Path) -> None:
    (tmp_path / "leaves").touch()
    with launched(tmp_path, procs) as (process, ranks):
        process.kill()
        process.wait()
        gone, alive = psutil.wait_procs(ranks, timeout=PATIENCE)
        assert len(gone) == procs and not alive


@pytest.mark.parametrize("procs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_polite_signal_reaches_each_rank_once_and_is_waited_for(procs: int, tmp_path: Path) -> None:
    (tmp_path / "leaves").touch()
    with launched(tmp_path, procs) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert [path.read_text() for path in sorted(tmp_path.glob("asked.?"))] == [f"{signal.SIGTERM.value}\n"] * procs
    assert len(list(tmp_path.glob("left.?"))) == procs
    assert "stopping; up to 30 s for a last checkpoint" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("procs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_does_not_leave_is_ended_after_the_grace(procs: int, tmp_path: Path) -> None:
    with launched(tmp_path, procs, grace=1) as (process, ranks):
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        gone, _ = psutil.wait_procs(ranks, timeout=PATIENCE)
        assert len(gone) == procs
    assert len(list(tmp_path.glob("asked.?"))) == procs


def test_a_cancelled_run_is_asked_to_end(tmp_path: Path) -> None:
    (tmp_path / "leaves").touch()
    with launched(tmp_path, 1) as (process, _):
        assert launcher().status(tmp_path).state == "running"
        launcher().cancel(tmp_path)
        assert process.wait(PATIENCE) == 0
    assert (tmp_path / "left.0").exists()
    launcher().cancel(tmp_path)


def test_a_cancelled_run_that_does_not_end_is_ended(tmp_path: Path) -> None:
    with launched(tmp_path, 1) as (process, (rank,)):
        launcher(grace=-local.SLACK + 1).cancel(tmp_path)
        assert process.wait(PATIENCE) == 0 and not rank.is_running()
    assert (tmp_path / "asked.0").exists()


def test_what_is_submitted_has_the_job_s_environment_and_not_the_outer_job_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "telling.py").write_text(
        "import json, os, sys; open(sys.argv[1] + '/told', 'w').write(json.dumps(dict(os.environ)))"
    )
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    launcher().submit(JobSpec(run=tmp_path, module="telling", environment={"WARP": "weft"}))
    told = json.loads((tmp_path / "told").read_text())
    assert told["WARP"] == "weft" and "RANK" not in told
    assert json.loads((tmp_path / "launcher.json").read_text())["launcher"] == "local"
