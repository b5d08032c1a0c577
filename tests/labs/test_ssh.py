"""launcher=ssh between two nodes with real sshd: the same losses, and nothing that stays, whatever is killed or cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from labs.netns import PATIENCE, Nodes, nodes
from loomtune.compose import quoted

PREFIX, NET = "labc", "10.83.0"

STEPS = 40

RANK = ["-u", "-m", "loomtune.worker"]

LOSS = 2e-6
"""The bound of the promise that the maths does not depend on the machine, relative."""

SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/host{i}
AuthorizedKeysFile {folder}/authorized
PidFile none
StrictModes no
UsePAM no
UseDNS no
PasswordAuthentication no
KbdInteractiveAuthentication no
"""

WILD = {"LOOM_A": 'it\'s "quoted" $(touch /tmp/x) `y` ; & | * ~ \\', "LOOM_B": "two\nlines\t é"}


@dataclass(frozen=True)
class Lab:
    """Two nodes with an ssh server each, whose clients know their keys. rows: a file with a difficult name."""

    nodes: Nodes
    folder: Path
    settings: tuple[str, ...]

    def options(self, known: str = "known") -> str:
        """The launcher's options: no setting of this machine's user counts."""
        files = (f"-oUserKnownHostsFile={self.folder}/{known}", "-oStrictHostKeyChecking=yes", "-oIdentitiesOnly=yes")
        return listed(["-F", "/dev/null", "-i", f"{self.folder}/key", *files])

    def launch(self, run: Path, *more: str) -> subprocess.Popen[bytes]:
        """`loomtune train` on the first node, over ssh."""
        there = ("launcher=ssh", "launcher.procs=1", "sharding=ddp", f"launcher.options={self.options()}")
        hosts = f"launcher.hosts=[{self.nodes.host(0)},{self.nodes.host(1)}]"
        words = [*self.settings, *there, *(() if any("launcher.hosts" in word for word in more) else (hosts,)), *more]
        command = [sys.executable, "-m", "loomtune.cli", "train", *words, f"run.dir={quoted(str(run))}"]
        return self.nodes.run(0, command, {"HF_HUB_OFFLINE": "1"}, log_of(run))

    def left(self, seconds: float) -> list[str]:
        """Command lines of what is not a server on either node, after so long at most."""
        until = time.monotonic() + seconds
        while (found := [" ".join(words) for i in range(2) for _, words in self.there(i)]) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Ranks of both nodes that live."""
        return [process for i in range(2) for process, words in self.there(i) if words[1:4] == RANK]

    def there(self, i: int) -> list[tuple[psutil.Process, list[str]]]:
        """Processes of a node that are no server, with their command lines."""
        found = []
        for pid in self.nodes.pids(i):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found += [(process, process.cmdline())] if process.name() != "sshd" else []
        return found


def listed(values: Sequence[str]) -> str:
    return f"[{','.join(map(quoted, values))}]"


def log_of(run: Path) -> Path:
    return run.parent / "log"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def result(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "result.json").read_text())
    return found


def wait(until: Callable[[], bool], process: subprocess.Popen[bytes], run: Path) -> None:
    began = time.monotonic()
    while not until():
        assert process.poll() is None, log_of(run).read_text()
        assert time.monotonic() - began < PATIENCE, log_of(run).read_text()
        time.sleep(0.05)


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@contextmanager
def servers(made: Nodes, folder: Path) -> Iterator[None]:
    """An ssh server on each node, on its own address alone, for a key that is made here."""
    for name in ("key", "stranger", "host0", "host1"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized")
    public = [(folder / f"host{i}.pub").read_text().split()[:2] for i in range(2)]
    (folder / "known").write_text("".join(f"{made.host(i)} {' '.join(public[i])}\n" for i in range(2)))
    (folder / "known").open("a").write(f"{made.address(1)} {' '.join(public[0])}\n")  # another's key
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on an empty folder there
    for i in range(2):
        config = folder / f"sshd{i}"
        config.write_text(SSHD.format(address=made.address(i), folder=folder, i=i))
        made.run(i, ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)], log=folder / f"sshd{i}.log")
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and any("listening" not in _read(folder / f"sshd{i}.log") for i in range(2)):
        time.sleep(0.05)
    yield


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, mixed_data: Path) -> Iterator[Lab]:
    if missing := [name for name in ("ssh", "ssh-keygen", "/usr/sbin/sshd") if shutil.which(name) is None]:
        pytest.skip(f"there is no {', '.join(missing)} here")
    folder = tmp_path_factory.mktemp("ssh")
    rows = folder / "it's $(a) file.jsonl"
    shutil.copy(mixed_data, rows)
    settings = (
        f"model.path={tiny_model}",
        "data=jsonl",
        f"data.path={quoted(str(rows))}",
        "optimizer.lr=1e-3",
        "tracker=[jsonl]",
        "batch.size=4",
        "evaluator=[]",
    )
    with ExitStack() as stack:
        made = stack.enter_context(nodes(2, PREFIX, NET))
        stack.enter_context(servers(made, folder))
        yield Lab(made, folder, settings)


@pytest.fixture(scope="module")
def alone(lab: Lab) -> list[float]:
    """Losses of one process."""
    run = lab.folder / "alone"
    words = [*lab.settings, "sharding=single", "launcher.procs=1", f"steps={STEPS}", f"run.dir={run}"]
    subprocess.run([sys.executable, "-m", "loomtune.cli", "train", *words], check=True, timeout=PATIENCE)
    return losses(run)


def environment_of(process: psutil.Process) -> Mapping[str, str]:
    said = Path(f"/proc/{process.pid}/environ").read_bytes().decode()
    return dict(part.split("=", 1) for part in said.split("\0") if "=" in part)


def test_two_nodes_have_the_losses_of_one_process_and_values_arrive_as_they_are(
    lab: Lab, alone: list[float], tmp_path: Path
) -> None:
    run = tmp_path / 'a "run" of $(mine)'
    values = ",".join(f"{name}: {quoted(value)}" for name, value in WILD.items())
    process = lab.launch(run, f"steps={STEPS}", f"launcher.environment={{{values}}}")
    wait(lambda: len(lab.ranks()) == 2, process, run)
    found = [environment_of(rank) for rank in lab.ranks()]
    assert process.wait(PATIENCE) == 0, log_of(run).read_text()
    assert [{name: each[name] for name in WILD} for each in found] == [WILD, WILD]
    assert losses(run) == pytest.approx(alone, rel=LOSS) and len(alone) == STEPS
    assert {path.name for path in run.glob("logs/*/*") if path.name.isdigit()} == {"0", "1"}
    assert lab.left(5) == []


LONG = ("steps=100000", "schedule=constant")


def test_nothing_runs_on_either_node_10_seconds_after_the_launcher_was_killed(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = lab.launch(run, *LONG)
    wait(lambda: steps(run) >= 3, process, run)
    assert len(lab.ranks()) == 2
    launcher = json.loads((run / "launcher.json").read_text())["pid"]
    os.kill(launcher, signal.SIGKILL)
    began = time.monotonic()
    left = lab.left(10)
    print(f"after {time.monotonic() - began:.1f} s nothing was left")
    assert left == []


@pytest.mark.parametrize("how", ["cut", "drop"])
def test_both_sides_of_a_link_that_is_gone_end_within_the_patience(how: str, lab: Lab, tmp_path: Path) -> None:
    run, patience = tmp_path / "run", 6
    process = lab.launch(run, *LONG, f"launcher.patience={patience}")
    wait(lambda: steps(run) >= 3, process, run)
    getattr(lab.nodes, how)(1)
    began = time.monotonic()
    try:
        left = lab.left(patience + 10)
        print(f"after {time.monotonic() - began:.1f} s nothing was left")
        assert left == []
        assert process.wait(10) == 1
    finally:
        getattr(lab.nodes, {"cut": "heal", "drop": "undrop"}[how])(1)
    said = log_of(run).read_text()
    assert f"nothing was heard of {lab.nodes.host(1)} for {patience} s" in said, said


@pytest.mark.parametrize("what", ["everything", "remote", "agent"])
def test_a_host_whose_processes_are_killed_is_named_and_ends_the_run(what: str, lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = lab.launch(run, *LONG, "launcher.grace=8")
    wait(lambda: steps(run) >= 3, process, run)
    killed = [
        other
        for other, words in lab.there(1)
        if what == "everything" or any(word.endswith(f".{what}") for word in words)
    ]
    assert len(killed) == 1 or what == "everything"
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for other in killed:
            with suppress(psutil.NoSuchProcess):
                other.send_signal(number)
    code = process.wait(PATIENCE)
    assert code == 1 or (what == "remote" and code == 75), "the ranks of a killed remote may have saved together"
    assert lab.left(15) == []
    host, said = lab.nodes.host(1), log_of(run).read_text()
    lost = f"the connection to {host} was lost, or what ran there was killed"
    assert (f"{host} ended first, with exit code 137" if what == "agent" else lost) in said, said


def test_a_run_that_is_asked_to_leave_saves_and_goes_on_with_the_same_losses(
    lab: Lab, alone: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = lab.launch(run, f"steps={STEPS}", "checkpoint.every=0")
    wait(lambda: steps(run) >= 2, process, run)
    os.kill(json.loads((run / "launcher.json").read_text())["pid"], signal.SIGINT)
    assert process.wait(PATIENCE) == 75, log_of(run).read_text()
    assert result(run)["status"] == "preempted" and 2 <= int(str(result(run)["step"])) < STEPS
    assert lab.left(5) == []
    assert lab.launch(run, f"steps={STEPS}").wait(PATIENCE) == 0, log_of(run).read_text()
    assert losses(run) == pytest.approx(alone, rel=LOSS)


def test_why_hosts_cannot_be_reached_is_told_with_what_mends_it(lab: Lab, tmp_path: Path) -> None:
    run, one, other = tmp_path / "run", lab.nodes.host(0), lab.nodes.host(1)
    hosts = f"launcher.hosts=[{one},{other}:2222,nobody@{other},{lab.nodes.address(1)},{NET}.77,no-such-host]"
    process = lab.launch(run, "steps=1", hosts, "launcher.patience=4")
    assert process.wait(PATIENCE) == 2
    said = log_of(run).read_text()
    for host, why in (
        (f"{other}:2222", "Connection refused"),
        (f"nobody@{other}", "Permission denied"),
        (lab.nodes.address(1), "Host key verification failed"),
        (f"{NET}.77", "No route to host"),
        ("no-such-host", "Could not resolve hostname"),
    ):
        assert any(f"{host}: ssh cannot connect: " in line and why in line for line in said.splitlines()), (host, said)
    assert "connect once by hand" in said and "launcher.options=[-i,KEY]" in said
    assert not (run / "logs").exists(), "no rank was started on the host that answered"
    assert lab.left(5) == []


def test_a_host_without_python_loomtune_or_the_run_s_folder_is_told(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for python, why, cure in (
        ("/no/such/python", "there is no Python at /no/such/python", "launcher.python="),
        (_bare(tmp_path), "loomtune is not installed", "pip install|install loomtune=="),
    ):
        process = lab.launch(run, "steps=1", f"launcher.python={quoted(str(python))}")
        assert process.wait(PATIENCE) == 2
        said = log_of(run).read_text()
        assert why in said and any(part in said for part in cure.split("|")), said
    assert not (run / "logs").exists()


def _bare(folder: Path) -> Path:
    """A Python that knows no package, at a path with spaces and quotes."""
    path = folder / "my 'python'"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    path.chmod(0o755)
    return path
