"""This machine: how many processes, what they are given, and that none outlives the launcher."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from loomtune.contracts import JobSpec, JobStatus
from loomtune.errors import UserError
from loomtune_launchers import jobs, local
from loomtune_launchers.local import Local
from loomtune_launchers.settings import LocalSettings
from loomtune_launchers.watching import ranklogs

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


@pytest.mark.parametrize("key", ["threads", "restarts", "grace"])
def test_what_counts_below_nothing_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"launcher\.{key}=-1"):
        launcher(**{key: -1})


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
    with pytest.raises(UserError, match="was not started by launcher=local"):
        launcher().status(tmp_path)
    with subprocess.Popen(["sleep", "600"]) as process:
        began = psutil.Process(process.pid).create_time()
        jobs.note(tmp_path, "local", pid=process.pid, host=socket.gethostname(), began=began)
        assert launcher().status(tmp_path).state == "running"
        process.kill()
    assert launcher().status(tmp_path).state == "failed"
    ended(tmp_path, "completed")
    assert launcher().status(tmp_path) == JobStatus("completed", "step 3")


def ended(run: Path, status: str) -> None:
    (run / "result.json").write_text(json.dumps({"status": status, "step": 3, "metrics": {}, "error": None}))


def test_the_status_of_a_run_by_hand_is_that_of_its_result(tmp_path: Path) -> None:
    ended(tmp_path, "stopped")
    assert launcher().status(tmp_path).state == "stopped"


def test_a_process_that_has_the_number_by_chance_is_not_the_run_s(tmp_path: Path) -> None:
    jobs.note(tmp_path, "local", pid=os.getpid(), host=socket.gethostname(), began=1.0)
    assert launcher().status(tmp_path).state == "failed"


def test_nothing_is_known_of_the_processes_of_another_machine(tmp_path: Path) -> None:
    jobs.note(tmp_path, "local", pid=os.getpid(), host="elsewhere", began=1.0)
    assert launcher().status(tmp_path).state == "unknown"
    with pytest.raises(UserError, match="cancel it there"):
        launcher().cancel(tmp_path)


WORKER = """
import os, signal, sys, time
from pathlib import Path
from loomtune.signals import die_with_parent
die_with_parent()
folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
print("here", flush=True)
def asked(number, frame):
    print("asked", flush=True)
    with (folder / f"asked.{rank}").open("a") as file:
        file.write(f"{number}\\n")
    if (folder / "leaves").exists():
        (folder / f"left.{rank}").touch()
        os._exit(0)
signal.signal(signal.SIGTERM, asked)
signal.signal(signal.SIGUSR1, asked)
if (folder / "helped").exists():
    import subprocess
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
(folder / f"pid.{rank}.new").write_text(str(os.getpid()))
(folder / f"pid.{rank}.new").rename(folder / f"pid.{rank}")
while True:
    time.sleep(0.05)
"""

LAUNCH = """
import sys
from pathlib import Path
from loomtune.contracts import JobSpec, JobStatus
from loomtune_launchers.local import Local
from loomtune_launchers.settings import LocalSettings
run = Path(sys.argv[1])
named = {"procs": int(sys.argv[2]), "grace": int(sys.argv[3])}
job = JobSpec(run=run, arguments=(str(run),), module="patient_rank", **named)
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


@pytest.mark.slow
@pytest.mark.parametrize("order", list(itertools.permutations(["launcher", "agent", "rank"])), ids="-".join)
def test_whatever_is_killed_first_no_process_stays(order: tuple[str, ...], tmp_path: Path) -> None:
    """Helpers of ranks too, in sessions of their own."""
    (tmp_path / "helped").touch()
    with launched(tmp_path, 2) as (process, ranks):
        root = psutil.Process(process.pid)
        named = {"launcher": root, "agent": root.children()[0], "rank": ranks[0]}
        everyone = [root, *root.children(recursive=True)]
        assert len(everyone) == 7, "a launcher, an agent and its shadow, and two ranks with a helper each"
        for name in order:
            with suppress(psutil.NoSuchProcess):
                named[name].kill()
        process.wait()
        _, alive = psutil.wait_procs(everyone, timeout=PATIENCE / 2)
        assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("procs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_polite_signal_reaches_each_rank_once_and_is_waited_for(procs: int, tmp_path: Path) -> None:
    (tmp_path / "leaves").touch()
    with launched(tmp_path, procs) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    number = signal.SIGTERM if procs == 1 else signal.SIGUSR1  # from an agent the one that may come twice
    assert [path.read_text() for path in sorted(tmp_path.glob("asked.?"))] == [f"{number.value}\n"] * procs
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
    assert launcher().status(tmp_path).state == "cancelled" and (tmp_path / "cancelled").exists()
    launcher().cancel(tmp_path)


def test_a_cancelled_run_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SLACK", 1)
    with launched(tmp_path, 1) as (process, (rank,)):
        launcher(grace=0).cancel(tmp_path)
        assert process.wait(PATIENCE) == 0 and not rank.is_running()
    assert (tmp_path / "asked.0").exists()


@pytest.mark.parametrize("procs", [1, 2])
def test_what_is_submitted_has_the_job_s_environment_literally_and_not_the_outer_job_s(
    procs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "telling.py").write_text(
        "import json, os, sys\n"
        "if os.environ.get('RANK', '0') == '0':\n"
        "    open(sys.argv[1] + '/told', 'w').write(json.dumps([dict(os.environ), sys.argv[2:]]))"
    )
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "cancelled").touch()
    hostile = "'\"$(touch /tmp/never)`id`\n$HOME\\; \u00e9 \t#"
    job = {"run": tmp_path, "arguments": (str(tmp_path), hostile), "module": "telling"}
    launcher().submit(JobSpec(**job, procs=procs, environment={"WARP": hostile}))
    told, words = json.loads((tmp_path / "told").read_text())
    assert told["WARP"] == hostile and words == [hostile] and told.get("RANK") != "3"
    assert not (tmp_path / "cancelled").exists(), "a new start takes it away"
    assert json.loads((tmp_path / "launcher.json").read_text())["launcher"] == "local"


def test_what_a_single_process_says_is_kept_where_no_terminal_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talking.py").write_text("import sys; print('warp'); print('weft', file=sys.stderr, end='')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    launcher().submit(JobSpec(run=tmp_path, arguments=(), module="talking"))
    heard = capfd.readouterr()
    assert (heard.out, heard.err) == ("warp\n", "weft")
    assert sorted(line.split(" | ")[1] for line in launcher().logs(tmp_path)) == ["warp", "weft"]
    assert [path.name for path in ranklogs.attempts(tmp_path)[0].iterdir()] == ["0"]


KILLED = "signal 9 (SIGKILL); where nobody sent it, the machine ran out of memory"


@pytest.mark.parametrize(
    ("does", "status", "error"),
    [
        ("os.kill(os.getpid(), 9)", "failed", rf"process \d+ on \S+ ended by {re.escape(KILLED)}"),
        ("os._exit(2)", "failed", r"UserError: process \d+ on \S+ ended with exit code 2"),
        ("open('cancelled', 'w'); os.kill(os.getpid(), 15)", "preempted", None),
        ('open(\'result.json\', \'w\').write(\'{"status": "failed", "error": "mine"}\')', "failed", "mine"),
    ],
)
def test_a_process_that_leaves_no_result_gets_one_that_says_how_it_ended(
    does: str, status: str, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaving.py").write_text(f"import os; {does}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    launcher().submit(JobSpec(run=tmp_path, arguments=(), module="leaving"))
    found = launcher().result(tmp_path)
    assert found is not None and found["status"] == status
    assert found["error"] is None if error is None else re.fullmatch(error, found["error"])


def test_who_was_asked_before_it_could_listen_is_preempted_unless_somebody_started_anew(tmp_path: Path) -> None:
    child = SimpleNamespace(pid=7, returncode=-15)
    jobs.note(tmp_path, "local", pid=8, host="here", began=0.0)
    local._conclude(tmp_path, child, True)  # type: ignore[arg-type]
    assert launcher().result(tmp_path) is None, "the other start's to write"
    jobs.note(tmp_path, "local", pid=7, host="here", began=0.0)
    local._conclude(tmp_path, SimpleNamespace(pid=7, returncode=1), False)  # type: ignore[arg-type]
    assert launcher().result(tmp_path) is None, "it said why, and a newer attempt may write"
    local._conclude(tmp_path, child, True)  # type: ignore[arg-type]
    assert launcher().result(tmp_path) == {"status": "preempted", "step": 0, "metrics": {}, "error": None}


def test_logs_are_followed_until_the_process_has_ended(tmp_path: Path) -> None:
    (tmp_path / "leaves").touch()
    with launched(tmp_path, 1) as (process, _):
        with pytest.raises(UserError):
            launcher().logs(tmp_path / "other")
        lines = launcher().logs(tmp_path, follow=True)
        assert next(lines).endswith("| here")
        process.send_signal(signal.SIGTERM)
        assert [line.split(" | ")[1] for line in lines] == ["asked"]
