"""What launcher=ssh would do, and what it says of hosts that cannot take part."""

from __future__ import annotations

import importlib.metadata
import io
import json
import socket
import threading
from pathlib import Path

import pytest

from launchers.ssh_side import launcher, prepared
from loomtune.contracts import JobSpec
from loomtune.errors import UserError
from loomtune_launchers import jobs, torchrun
from loomtune_launchers.ssh import hosts as ssh_hosts
from loomtune_launchers.ssh.link import Link
from loomtune_launchers.ssh.settings import SshSettings
from loomtune_launchers.ssh.ssh import Ssh


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


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
    assert first[-1] == "exec '/a b' -m loomtune_launchers.ssh.remote"
    sent = json.loads(once.input.splitlines()[0])
    assert jobs.read(json.dumps(sent["job"])) == spec == jobs.read(once.files["job.json"])
    assert spec.environment["WARP"] == wild["WARP"] and (spec.nodes, spec.procs) == ((2, 2), 2)
    assert not any("WARP" in word or "touch" in word for command in once.commands for word in command)


def test_torchrun_is_told_who_hosts_the_meeting_and_by_which_address_each_is_reached() -> None:
    meeting = torchrun.Meeting("node1:4000", "attempt", hosts=False, address="10.0.0.2")
    arguments = torchrun.arguments(JobSpec(run=Path("run"), arguments=(), nodes=(2, 2)), meeting)
    assert {"--rdzv-endpoint=node1:4000", "--rdzv-conf=is_host=false", "--local-addr=10.0.0.2"} <= set(arguments)


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


@pytest.mark.parametrize("key", ["requeues", "restarts", "grace", "threads"])
def test_nothing_counts_below_nothing(key: str) -> None:
    with pytest.raises(UserError, match=rf"launcher\.{key}=-1 is less than 0"):
        launcher("one", **{key: -1})


def test_an_ipv6_address_stands_in_brackets_before_its_port() -> None:
    there = launcher("[fd00::2]:2222", procs=1)
    assert '"endpoint": "[fd00::2]:FREE-PORT"' in there.render(there.spec(Path("RUN"), 1)).input


def test_a_long_order_that_waits_for_its_connection_holds_nobody_up() -> None:
    link = Link(ssh_hosts.parse("one"), ("sleep", "60"))
    link.order("x" * 2**20)
    beating = threading.Thread(target=link.beat, args=(0,), daemon=True)
    try:
        beating.start()
        beating.join(5)
        assert not beating.is_alive(), "more than a pipe holds"
    finally:
        link.process.kill()
        link.process.wait()


def test_what_two_hosts_say_at_once_is_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    monkeypatch.setattr("sys.stdout", Terminal())
    link = Link(ssh_hosts.parse("one"), ("sh", "-c", "read order; read go; echo this is one"))
    link.order("{}")
    link.go({})
    link.process.wait()
    link.drained()
    link.close()
    assert pieces == ["this is one\n"]
