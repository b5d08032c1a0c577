"""What the batch script of a Slurm job becomes: it hears of the time limit, and decides what follows the run's end."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loomtune.contracts import JobSpec
from loomtune_launchers import jobs
from loomtune_launchers.slurm import job as slurm_job
from loomtune_launchers.slurm import log
from loomtune_launchers.slurm.job import Batch
from loomtune_launchers.slurm.queue import Job
from support import signals_kept

SAID = {"SLURM_JOB_ID": "31000", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_NUM_NODES": "2"}


class Queue:
    """Stands for Slurm. state: its word for the job. preempted, lost: what became of the job, or of a node of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state, self.preempted, self.lost, self.refuses = "RUNNING", False, False, False
        self.requeued: list[str] = []
        self.ended: list[str] = []
        monkeypatch.setattr(Job, "state", lambda job: (self.state, ""))
        monkeypatch.setattr(Job, "preempted", lambda job: self.preempted)
        monkeypatch.setattr(Job, "requeue", lambda job: self.requeued.append(job.number) or not self.refuses)
        monkeypatch.setattr(Job, "stay_ended", lambda job: self.ended.append(job.number))
        monkeypatch.setattr(Batch, "_answer", lambda batch: not self.lost)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    return Queue(monkeypatch)


def batch(run: Path, starts: int = 0, requeues: int = 2, **said: str) -> Batch:
    (run / "job.json").write_text(jobs.text(JobSpec(run=run, arguments=(), requeues=requeues)))
    return Batch(run, {**SAID, "SLURM_RESTART_COUNT": str(starts), **said})


def result(run: Path, status: str, error: str | None = None) -> None:
    said = {"status": status, "step": 3, "metrics": {}, "error": error}
    (run / "result.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("status", "error", "code", "ends"),
    [("completed", None, 0, 0), ("stopped", None, 0, 0), ("completed", "no export", 1, 1), ("completed", None, 1, 0)],
)
def test_a_run_that_is_over_ends_the_job(
    status: str, error: str | None, code: int, ends: int, queue: Queue, tmp_path: Path
) -> None:
    result(tmp_path, status, error)
    assert batch(tmp_path).after(code) == ends
    assert not queue.requeued


@pytest.mark.parametrize(
    ("status", "code", "slurm", "again", "ends"),
    [
        ("preempted", 75, {}, True, 75),
        ("failed", 1, {}, False, 1),
        ("failed", 1, {"preempted": True}, True, 1),
        ("failed", 1, {"lost": True}, True, 1),
        ("", 1, {"preempted": True}, True, 1),
        ("", 137, {}, False, 137),
        ("", 0, {}, False, 1),
        ("failed", 2, {"lost": True}, False, 2),
        ("", 2, {"preempted": True}, False, 2),
        ("", 75, {}, True, 75),
        ("preempted", 75, {"state": "COMPLETING"}, False, 75),
        ("preempted", 75, {"state": "CANCELLED"}, False, 75),
        ("preempted", 75, {"refuses": True}, True, 75),
    ],
)
def test_what_the_run_could_not_help_queues_it_again(
    status: str, code: int, slurm: dict[str, Any], again: bool, ends: int, queue: Queue, tmp_path: Path
) -> None:
    vars(queue).update(slurm)
    if status:
        result(tmp_path, status)
    assert batch(tmp_path).after(code) == ends
    assert bool(queue.requeued) is again


def test_a_controller_that_is_away_for_a_moment_is_waited_for(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([("UNKNOWN", "no answer"), ("UNKNOWN", "no answer"), ("RUNNING", "")])
    monkeypatch.setattr(Job, "state", lambda job: next(states))
    result(tmp_path, "preempted")
    assert batch(tmp_path).after(75) == 75
    assert queue.requeued


def test_a_cancelled_run_is_not_queued_again(queue: Queue, tmp_path: Path) -> None:
    result(tmp_path, "preempted")
    (tmp_path / "cancelled").touch()
    assert batch(tmp_path).after(75) == 75
    assert not queue.requeued


@pytest.mark.parametrize(("starts", "again"), [(0, True), (1, True), (2, False), (3, False)])
def test_no_more_often_than_was_allowed(
    starts: int, again: bool, queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result(tmp_path, "preempted")
    assert batch(tmp_path, starts, requeues=2).after(75) == 75
    assert bool(queue.requeued) is again
    assert ("launcher.requeues=2 is used up" in capsys.readouterr().err) is not again


def test_an_item_of_an_array_queues_itself_and_not_the_array(queue: Queue, tmp_path: Path) -> None:
    result(tmp_path, "preempted")
    batch(tmp_path, SLURM_ARRAY_JOB_ID="30999", SLURM_ARRAY_TASK_ID="0").after(75)
    assert queue.requeued == ["30999_0"]


NODES = """
import json, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])
if not (run / "result.json").exists() and not (run / "stop").exists():
    os.kill(os.getppid(), signal.SIGUSR1)
    while not (run / "stop").exists():
        pass
    (run / "result.json").write_text(json.dumps({"status": "preempted", "error": None, "met": sys.argv[2:]}))
sys.exit(75)
"""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run whose nodes are a program that makes Slurm's signal itself, and asks that nothing of before be left."""
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ "$*" = "show hostnames a[1-2]" ] && echo a1 && echo a2\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = tmp_path / "run"
    run.mkdir()
    (run / "slurm.json").write_text(json.dumps([sys.executable, "-c", NODES, str(run)]))
    result(run, "failed")
    (run / "stop").touch()
    with signals_kept():
        yield run


def test_the_signal_before_the_time_limit_asks_the_ranks_to_leave(queue: Queue, served: Path) -> None:
    assert batch(served, starts=1, requeues=2).serve() == 75
    assert json.loads((served / "result.json").read_text())["met"] == ["a1:16000", "31000-1", "2"]
    assert queue.requeued == ["31000"] and not queue.ended
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "what was decided is not disturbed by Slurm's end of it"


def test_the_last_start_tells_slurm_not_to_start_it_again_by_itself(queue: Queue, served: Path) -> None:
    assert batch(served, starts=2, requeues=2).serve() == 75
    assert queue.ended == ["31000"] and not queue.requeued


def test_a_run_that_was_cancelled_while_it_waited_does_not_start(queue: Queue, served: Path) -> None:
    (served / "cancelled").touch()
    assert batch(served).serve() == 1
    assert json.loads((served / "result.json").read_text())["status"] == "failed", "nothing was touched"


def test_a_job_leaves_a_run_alone_that_was_started_in_another_way(
    queue: Queue, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for launcher, said in (("local", {"pid": 7}), ("slurm", {"job": "31001"})):
        jobs.note(served, launcher, **said)
        assert batch(served).serve() == 1
        assert "started in another way" in capsys.readouterr().err
    assert json.loads((served / "result.json").read_text())["status"] == "failed", "nothing was touched"


def test_a_job_that_begins_before_its_record_is_written_waits_for_it(
    queue: Queue, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.note(served, "slurm", job="30000")
    monkeypatch.setattr(time, "sleep", lambda seconds: jobs.note(served, "slurm", job="31000"))
    assert batch(served).serve() == 75


def test_a_run_that_was_over_when_its_node_was_lost_is_not_run_again(queue: Queue, served: Path) -> None:
    result(served, "completed")
    assert batch(served, starts=1).serve() == 0
    assert json.loads((served / "result.json").read_text())["step"] == 3, "its result stays"


def test_a_result_that_another_node_wrote_may_be_seen_late(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: result(tmp_path, "completed"))
    assert batch(tmp_path).after(0) == 0


def test_a_port_that_is_taken_is_passed_over() -> None:
    port = slurm_job._free(31000)
    with socket.create_server(("", port)):
        assert slurm_job._free(31000) > port
    assert slurm_job._free(31000) == port


def test_an_item_of_an_array_finds_its_run_in_the_table(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.json").write_text(json.dumps(["/no/such", str(tmp_path)]))
    (tmp_path / "cancelled").touch()
    batch(tmp_path)
    for name, value in {**SAID, "SLURM_ARRAY_JOB_ID": "30999", "SLURM_ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert slurm_job.main(["--item-of", str(tmp_path / "table.json")]) == 1


def record(run: Path, attempt: str, rank: int, *lines: str) -> None:
    folder = run / "logs" / attempt / str(rank)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("a") as file:
        file.writelines(f"2026-11-22T10:00:0{i}.000000Z node{rank} o {line}\n" for i, line in enumerate(lines))


def test_the_log_has_every_line_once_though_rank_0_speaks_in_the_scripts_file_too(tmp_path: Path) -> None:
    record(tmp_path, "7-0", 0, "step 1", "step 2")
    time.sleep(0.01)
    record(tmp_path, "7-1", 0, "step 2", "step 3")
    record(tmp_path, "7-1", 1, "hello")
    said = "step 1\nstep 2\nsrun: error\nloomtune: queued again\nstep 2\nstep 3\nstep 3\n"
    (tmp_path / "slurm-7.out").write_text(said)
    expected = ["srun: error", "loomtune: queued again", "step 3"]
    expected += ["10:00:00.000 rank 0 node0 | step 2", "10:00:00.000 rank 1 node1 | hello"]
    expected += ["10:00:01.000 rank 0 node0 | step 3"]
    assert list(log.lines(tmp_path, tmp_path / "slurm-7.out", None)) == expected


def test_a_log_is_followed_until_the_job_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "EVERY", 0.0)
    record(tmp_path, "7-0", 0, "step 1")
    asked = []

    def active() -> bool:
        asked.append(len(asked))
        if len(asked) == 2:
            record(tmp_path, "7-0", 1, "hello")
            (tmp_path / "slurm-7.out").write_text("step 1\nsrun: done\n")
        return len(asked) < 4

    found = list(log.lines(tmp_path, tmp_path / "slurm-7.out", active))
    ranks = [line for line in found if "rank" in line]
    assert [line.partition(" | ")[2] for line in ranks] == ["step 1", "hello"]
    assert [line for line in found if "rank" not in line] == ["srun: done"]
