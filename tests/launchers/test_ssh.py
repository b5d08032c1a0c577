"""launcher=ssh over a program named ssh that runs here what it is asked to run there; sshd itself is for tests/labs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from loomtune.contracts import JobSpec
from loomtune.errors import RunFailed, UserError
from loomtune_launchers import jobs, remote
from loomtune_launchers.ssh import CANCELLED, Ssh
from loomtune_launchers.ssh_settings import SshSettings

PATIENCE = 60.0
"""Seconds until what is waited for counts as hanging."""

SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
case "$2" in
    refusing) echo "ssh: connect to host refusing port 22: Connection refused" >&2; exit 255;;
    strange) echo "Host key verification failed." >&2; exit 255;;
    locked) echo "me@locked: Permission denied (publickey)." >&2; exit 255;;
    empty) exec sh -c "exec /no/such/python -m loomtune_launchers.remote";;
    bare) exec {python} -I -S -m loomtune_launchers.remote;;
    talking) echo "welcome to this machine";;
esac
exec {python} {folder}/side.py "$2"
"""

SIDE = """
import importlib.metadata, json, os, sys
from dataclasses import asdict
from pathlib import Path
from loomtune_launchers import jobs, remote, torchrun
host, version, remote.VISIBLE = sys.argv[1], importlib.metadata.version, 0
remote.LAST = float(os.environ.get("LAST", "0.5"))
if host == "blind":
    jobs.RECORD = "nothing"
if host == "old":
    importlib.metadata.version = lambda name: "0.0.1" if name == "loomtune" else version(name)
if host == "other":
    importlib.metadata.version = lambda name: "2.0.0" if name == "torch" else version(name)
def command(spec, meeting):
    (spec.run / f"met.{host}").write_text(json.dumps(asdict(meeting)))
    return (sys.executable, "-m", spec.module, *spec.arguments, host)
torchrun.command = command
code = remote.main()
sys.stdout.flush()
os._exit(code)
"""
"""The other side as it is, but for torch: the module stands in the agent's place, told the host's name as well."""

AGENT = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, host = Path(sys.argv[1]), sys.argv[2]
def asked(number, frame):
    with (folder / f"asked.{host}").open("a") as file:
        file.write("asked\\n")
    if (folder / "leaves").exists():
        os._exit(0)
signal.signal(signal.SIGTERM, asked)
child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdin=subprocess.DEVNULL)
print(f"this is {host}", flush=True)
print(f"warning of {host}", file=sys.stderr, flush=True)
(folder / f"pids.{host}.new").write_text(f"{os.getpid()} {os.getppid()} {child.pid}")
(folder / f"pids.{host}.new").rename(folder / f"pids.{host}")
while not (folder / f"ends.{host}").exists():
    time.sleep(0.02)
sys.exit(int((folder / f"ends.{host}").read_text()))
"""

LAUNCH = """
import json, sys
from pathlib import Path
from loomtune.errors import LoomtuneError
from loomtune_launchers import ssh_group
from loomtune_launchers.ssh import Ssh
from loomtune_launchers.ssh_settings import SshSettings
from loomtune.contracts import JobSpec
ssh_group.SETTLE, ssh_group.LAST = 0.2, 0.5
settings = SshSettings(**json.loads(sys.argv[2]))
hosts = len(settings.hosts)
job = JobSpec(run=Path(sys.argv[1]), module="patient_agent", arguments=(sys.argv[1],), nodes=(hosts, hosts),
              grace=settings.grace, requeues=settings.requeues)
try:
    Ssh(settings).submit(job)
except LoomtuneError as error:
    print(f"loomtune: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, beside a program named ssh that comes first."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH.format(python=shlex.quote(sys.executable), folder=shlex.quote(str(tmp_path))))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "side.py").write_text(SIDE)
    (tmp_path / "patient_agent.py").write_text(AGENT)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 40000 10.0.0.2 22")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def launcher(*hosts: str, **settings: object) -> Ssh:
    return Ssh(SshSettings(hosts=list(hosts), **settings))


@contextmanager
def launched(run: Path, *hosts: str, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher in a process of its own, whose agents have started, unless it has ended."""
    said = json.dumps({"hosts": hosts, "address": "192.0.2.1", **settings})
    with (run / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", LAUNCH, str(run), said], stdout=log, stderr=log)
    try:
        wait(lambda: process.poll() is not None or all((run / f"pids.{host}").exists() for host in hosts))
        yield process
    finally:
        process.kill()
        process.wait()
        for path in run.glob("pids.*"):
            for pid in map(int, path.read_text().split()):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def wait(until: Callable[[], bool], seconds: float = PATIENCE) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < seconds, "it did not come to pass"
        time.sleep(0.02)


def there(run: Path) -> list[int]:
    """Processes of the other sides that live: of each host the agent, the side, a child in its own session."""
    pids = [int(pid) for path in run.glob("pids.*") for pid in path.read_text().split()]
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def log(run: Path) -> str:
    return (run / "log").read_text()


def end(run: Path, *hosts: str, code: int = 0) -> None:
    for host in hosts:
        (run / f"ends.{host}.new").write_text(str(code))
        (run / f"ends.{host}.new").rename(run / f"ends.{host}")


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


def test_what_is_rendered_is_pure_and_holds_no_value_of_the_user_s(tmp_path: Path) -> None:
    wild = {"WARP": 'a\'b "c" $(touch x)\n`d`; *'}
    settings = SshSettings(
        hosts=["me@one:2222", "two"], procs=2, environment=wild, options=["-i", "a key"], python="/a b"
    )
    spec = Ssh(settings).spec(tmp_path / "run", 4)
    once, again = Ssh(settings).render(spec), Ssh(settings).render(spec)
    assert once == again and not list(tmp_path.iterdir())
    first, second = once.commands
    assert first[:6] == ("ssh", "-T", "-o", "BatchMode=yes", "-i", "a key")
    assert first[-6:-1] == ("me", "-p", "2222", "--", "one") and second[-2] == "two"
    assert first[-1] == "exec '/a b' -m loomtune_launchers.remote"
    sent = json.loads(once.input.splitlines()[0])
    assert jobs.read(json.dumps(sent["job"])) == spec == jobs.read(once.files["job.json"])
    assert spec.environment["WARP"] == wild["WARP"] and (spec.nodes, spec.procs) == ((2, 2), 2)
    assert not any("WARP" in word or "touch" in word for command in once.commands for word in command)


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
        assert process.wait(PATIENCE) == 0
        assert not there(run)
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


def test_a_host_that_does_not_leave_is_ended_after_the_grace(run: Path) -> None:
    with launched(run, "one", grace=-4) as process:
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


def test_why_hosts_cannot_take_part_is_told_of_all_at_once_and_none_begins(run: Path) -> None:
    hosts = ("one", "refusing", "strange", "locked", "empty", "bare")
    with pytest.raises(UserError) as caught:
        launcher(*hosts).submit(JobSpec(run=run, arguments=()))
    said = {fault.what.partition(":")[0]: fault for fault in caught.value.faults}
    assert set(said) == set(hosts) - {"one"}
    assert "Connection refused" in said["refusing"].what and "-- refusing true" in said["refusing"].cure
    assert "by hand" in said["strange"].cure and "ssh-keyscan" in said["strange"].cure
    assert "launcher.options=[-i,KEY]" in said["locked"].cure
    assert "launcher.python=" in said["empty"].cure and "there is no Python" in said["empty"].what
    assert "not installed" in said["bare"].what and importlib.metadata.version("loomtune") in said["bare"].cure
    assert not list(run.glob("met.*")), "no host was let go"


def test_hosts_that_are_not_what_the_run_needs_are_told(run: Path) -> None:
    settings = {"folder": "/no/such/folder", "address": "no-such-name.invalid"}
    with pytest.raises(UserError) as caught:
        launcher("blind", "old", "other", "one", **settings).submit(JobSpec(run=run, arguments=()))
    said = "\n".join(map(str, caught.value.faults))
    assert "old has loomtune 0.0.1" in said and "blind does not see" in said
    assert "one has no folder /no/such/folder" in said and "launcher.folder=" in said
    assert "one does not know the name no-such-name.invalid" in said and "launcher.address=" in said
    assert "different versions of torch" in said and "other 2.0.0" in said
    assert "one does not see" not in said and not list(run.glob("met.*"))


def test_a_port_that_is_taken_is_told(run: Path) -> None:
    with socket.create_server(("", 0)) as server, pytest.raises(UserError, match=r"launcher\.port=0"):
        launcher("localhost", port=server.getsockname()[1]).submit(JobSpec(run=run, arguments=()))


def test_without_an_ssh_program_it_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(run))
    with pytest.raises(UserError, match="OpenSSH"):
        launcher("one").submit(JobSpec(run=run, arguments=()))


def test_a_run_can_be_asked_after_and_ended_from_another_process(run: Path) -> None:
    (run / "leaves").touch()
    with launched(run, "one", "two") as process:
        assert launcher().status(run).state == "running"
        launcher().cancel(run)
        assert process.wait(PATIENCE) == 0
        assert not there(run) and launcher().status(run).state == "cancelled"
    launcher().cancel(run)


@pytest.mark.slow
def test_a_run_can_be_ended_from_another_host(run: Path) -> None:
    (run / "leaves").touch()
    with launched(run, "one") as process:
        said = json.loads((run / "launcher.json").read_text())
        (run / "launcher.json").write_text(json.dumps({**said, "host": "elsewhere"}))
        assert launcher().status(run).state == "unknown"
        launcher().cancel(run)
        assert process.wait(PATIENCE) == 0
    assert launcher().status(run).state == "cancelled"


@pytest.mark.slow
def test_a_cancelled_run_that_does_not_end_is_ended(run: Path) -> None:
    with launched(run, "one", grace=600) as process:
        Ssh(SshSettings(hosts=["one"], grace=-12)).cancel(run)
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
        PREEMPTED.replace("sys.exit", f"(Path(sys.argv[1]) / '{CANCELLED}').touch(); sys.exit")
    )
    with launched(run, "one", requeues=5) as process:
        assert process.wait(PATIENCE) == 0, log(run)
    assert (run / "starts").read_text() == "started\n"


@pytest.mark.parametrize(
    ("settings", "many", "expected"), [({"procs": 3}, True, 6), ({}, False, 2), ({"procs": 1}, True, 2)]
)
def test_the_world_is_so_many_processes_on_each_host(settings: dict[str, object], many: bool, expected: int) -> None:
    assert launcher("one", "two", **settings).processes(many) == expected


def test_auto_is_the_slots_of_the_hostfile_and_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("one slots=4\ntwo slots=4\n")
    assert Ssh(SshSettings(hostfile=str(tmp_path / "hostfile"))).processes(True) == 8
    with pytest.raises(UserError, match=r"launcher\.procs="):
        launcher("one", "two").processes(True)


@pytest.mark.parametrize("settings", [{"patience": 0}, {"port": 70000}, {"procs": "many"}, {"hosts": ["-o"]}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Ssh(SshSettings(**settings))
