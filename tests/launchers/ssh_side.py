"""A program named ssh that runs here what it is asked to run there, and a patient module in the agent's place."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from loomtune_launchers.ssh.settings import SshSettings
from loomtune_launchers.ssh.ssh import Ssh

PATIENCE = 60.0
"""Seconds until what is waited for counts as hanging."""

SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
case "$2" in
    refusing) echo "ssh: connect to host refusing port 22: Connection refused" >&2; exit 255;;
    strange) echo "Host key verification failed." >&2; exit 255;;
    locked) echo "me@locked: Permission denied (publickey)." >&2; exit 255;;
    empty) exec sh -c "exec /no/such/python -m loomtune_launchers.ssh.remote";;
    bare) exec {python} -I -S -m loomtune_launchers.ssh.remote;;
    talking) echo "welcome to this machine";;
    silent) touch {folder}/run/asked.silent; exec sleep 600;;
esac
exec {python} {folder}/side.py "$2"
"""

SIDE = """
import importlib.metadata, json, os, sys
from dataclasses import asdict
from pathlib import Path
from loomtune_launchers import jobs, torchrun
from loomtune_launchers.ssh import remote
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
from loomtune_launchers.ssh import group
from loomtune_launchers.ssh.ssh import Ssh
from loomtune_launchers.ssh.settings import SshSettings
from loomtune.contracts import JobSpec
group.SETTLE, group.LAST = 0.2, 0.5
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


def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
    return [pid for pid in pids if lives(pid)]


def lives(pid: int) -> bool:
    """Asked once: between two questions a process may go."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def log(run: Path) -> str:
    return (run / "log").read_text()


def end(run: Path, *hosts: str, code: int = 0) -> None:
    for host in hosts:
        (run / f"ends.{host}.new").write_text(str(code))
        (run / f"ends.{host}.new").rename(run / f"ends.{host}")
