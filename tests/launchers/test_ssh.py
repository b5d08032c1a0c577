"""launcher=ssh over a program named ssh that runs here what is to run there; sshd itself is for tests/labs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launchers.ssh_side import LAUNCH, PATIENCE, end, launched, launcher, log, prepared, there, wait
from loomtune.contracts import JobSpec
from loomtune.errors import LeaseLost, Preempted, RunFailed
from loomtune_launchers import jobs
from loomtune_launchers.ssh import remote, ssh
from loomtune_launchers.ssh.settings import SshSettings
from loomtune_launchers.ssh.ssh import Ssh


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


def test_all_hosts_meet_at_the_first_and_what_they_say_is_heard(run: Path) -> None:
    with launched(run, "one", "talking") as process:
        end(run, "one", "talking")
        assert process.wait(PATIENCE) == 0, log(run)
    one, other = (json.loads((run / f"met.{host}").read_text()) for host in ("one", "talking"))
    assert one["hosts"] and not other["hosts"]
    assert one["endpoint"] == other["endpoint"] and one["endpoint"].startswith("192.0.2.1:")
    assert one["attempt"] == other["attempt"] == json.loads((run / "launcher.json").read_text())["attempt"]
    assert (one["address"], other["address"]) == ("192.0.2.1", "10.0.0.2")
    assert {"this is one", "warning of one", "this is talking"} <= set(log(run).splitlines())
    assert "welcome" not in log(run) and "\0" not in log(run)
    assert not there(run)


def test_values_arrive_as_they_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = {"WARP": 'a\'b "c" $(touch x)\n`d`; \\n * é \x01'}
    (run.parent / "telling.py").write_text(
        "import json, os, sys; open(sys.argv[1] + '/told', 'w').write(json.dumps([dict(os.environ), sys.argv]))"
    )
    job = JobSpec(run=run, module="telling", arguments=(str(run), "two words", "$(x)\n"), environment=wild)
    monkeypatch.setenv("RANK", "3")
    launcher("one", address="192.0.2.1").submit(job)
    environment, arguments = json.loads((run / "told").read_text())
    assert environment["WARP"] == wild["WARP"] and "RANK" not in environment
    assert arguments[1:] == [str(run), "two words", "$(x)\n", "one"]
    assert int(environment["OMP_NUM_THREADS"]) >= 1
    assert list(run.parent.glob("**/x")) == []


def test_a_host_that_fails_ends_the_others_and_is_named(run: Path) -> None:
    with launched(run, "one", "two", "three") as process:
        end(run, "two", code=7)
        assert process.wait(PATIENCE) == RunFailed.exit_code
        assert "two ended first, with exit code 7" in log(run)
        assert "warning of two" in log(run).partition("ended first")[2], "with the last that it said"
        assert (run / "asked.one").exists() and not (run / "asked.two").exists()
        assert not there(run)


@pytest.mark.parametrize("last", ["0.5", pytest.param(str(remote.LAST), marks=pytest.mark.slow)])
def test_nothing_runs_there_10_seconds_after_the_launcher_was_killed(
    last: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAST", last)
    with launched(run, "one", "two") as process:
        assert len(there(run)) == 6
        process.kill()
        process.wait()
        wait(lambda: not there(run), seconds=10)
    assert (run / "asked.one").exists(), "politely at first"


def test_a_polite_signal_reaches_every_host_once_and_is_waited_for(run: Path) -> None:
    (run / "leaves").touch()
    with launched(run, "one", "two") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == Preempted.exit_code
        assert not there(run)
    assert launcher().status(run).state == "preempted", "though it left no result"
    assert [(run / f"asked.{host}").read_text() for host in ("one", "two")] == ["asked\n"] * 2
    assert "up to 30 s for a last checkpoint" in log(run)


def test_a_second_signal_ends_all_at_once(run: Path) -> None:
    with launched(run, "one", "two", grace=600) as process:
        process.send_signal(signal.SIGINT)
        wait(lambda: all((run / f"asked.{host}").exists() for host in ("one", "two")))
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
        assert not there(run)


@pytest.mark.slow
def test_a_host_that_does_not_leave_is_ended_after_the_grace(run: Path) -> None:
    with launched(run, "one", grace=0) as process:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        assert not there(run)
    assert (run / "asked.one").exists()


@pytest.mark.slow
def test_a_launcher_that_says_nothing_for_long_is_given_up(run: Path) -> None:
    with launched(run, "one", patience=2) as process:
        process.send_signal(signal.SIGSTOP)
        wait(lambda: not there(run))
        process.send_signal(signal.SIGCONT)
        process.wait(PATIENCE)


@pytest.mark.slow
def test_a_host_that_says_nothing_for_long_is_given_up_and_named(run: Path) -> None:
    with launched(run, "one", "two", patience=2) as process:
        side = int((run / "pids.two").read_text().split()[1])
        os.kill(side, signal.SIGSTOP)
        assert process.wait(PATIENCE) == RunFailed.exit_code
        assert "nothing was heard of two for 2 s" in log(run)


def test_a_run_can_be_asked_after_and_ended_from_another_process(run: Path) -> None:
    (run / "leaves").touch()
    with launched(run, "one", "two") as process:
        assert launcher().status(run).state == "running"
        launcher().cancel(run)
        assert process.wait(PATIENCE) == Preempted.exit_code
        assert not there(run) and launcher().status(run).state == "cancelled"
    launcher().cancel(run)


def test_a_run_that_is_asked_to_leave_before_its_hosts_have_answered_may_be_started_again(run: Path) -> None:
    said = json.dumps({"hosts": ["silent"], "address": "192.0.2.1"})
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, str(run), said], stderr=subprocess.PIPE, text=True)
    wait((run / "asked.silent").exists)
    assert launcher().status(run).state == "running"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == Preempted.exit_code and "start it again" in said
    assert launcher().status(run).state == "preempted"


def test_a_run_that_a_later_start_took_over_leaves_that_ones_record_alone(run: Path) -> None:
    with launched(run, "one") as process:
        said = json.loads((run / "launcher.json").read_text())
        later = json.dumps({**said, "attempt": "later", "pid": os.getpid(), "began": psutil.Process().create_time()})
        (run / "launcher.json").write_text(later)
        end(run, "one", code=1)
        assert process.wait(PATIENCE) == LeaseLost.exit_code and "later start" in log(run)
    assert (run / "launcher.json").read_text() == later
    assert launcher().status(run).state == "running"


@pytest.mark.slow
def test_a_run_can_be_ended_from_another_host(run: Path) -> None:
    (run / "leaves").touch()
    with launched(run, "one") as process:
        said = json.loads((run / "launcher.json").read_text())
        (run / "launcher.json").write_text(json.dumps({**said, "host": "elsewhere"}))
        assert launcher().status(run).state == "unknown"
        launcher().cancel(run)
        assert process.wait(PATIENCE) == Preempted.exit_code
    assert launcher().status(run).state == "cancelled"


@pytest.mark.slow
def test_a_cancelled_run_that_does_not_end_is_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "SLACK", 0)
    monkeypatch.setattr(ssh, "LAST", 3)
    with launched(run, "one", grace=600) as process:
        Ssh(SshSettings(hosts=["one"], grace=0)).cancel(run)
        process.wait(PATIENCE)
        wait(lambda: not there(run), seconds=10)


@pytest.mark.parametrize(("requeues", "starts"), [(0, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_run_that_others_asked_to_leave_starts_again_so_often(requeues: int, starts: int, run: Path) -> None:
    (run.parent / "patient_agent.py").write_text(PREEMPTED)
    with launched(run, "one", requeues=requeues) as process:
        assert process.wait(PATIENCE) == 0, log(run)
    attempts = (run / "starts").read_text().splitlines()
    assert len(attempts) == starts
    assert json.loads((run / "result.json").read_text())["status"] == "preempted"


PREEMPTED = """
import json, sys
from pathlib import Path
with (Path(sys.argv[1]) / "starts").open("a") as file:
    file.write("started\\n")
said = {"status": "preempted", "step": 3, "metrics": {}, "error": None}
(Path(sys.argv[1]) / "result.json").write_text(json.dumps(said))
sys.exit(75)
"""


def test_a_cancelled_run_does_not_start_again(run: Path) -> None:
    (run.parent / "patient_agent.py").write_text(
        PREEMPTED.replace("sys.exit", f"(Path(sys.argv[1]) / '{jobs.CANCELLED}').touch(); sys.exit")
    )
    with launched(run, "one", requeues=5) as process:
        assert process.wait(PATIENCE) == 0, log(run)
    assert (run / "starts").read_text() == "started\n"
    assert launcher().status(run).state == "cancelled" and launcher().result(run) is not None
