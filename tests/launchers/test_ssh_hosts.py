"""Which hosts launcher=ssh goes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from loomtune.errors import UserError
from loomtune_launchers.ssh import hosts as ssh_hosts
from loomtune_launchers.ssh.settings import SshSettings

DEEPSPEED = """
# two machines
one slots=4
me@two slots=4   # the newer one

"""

OPENMPI = "one slots=2 max_slots=4\ntwo slots=2 max-slots=2\n"


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ("one", ("--", "one")),
        ("me@one", ("-l", "me", "--", "one")),
        ("me@one.example.org:2222", ("-l", "me", "-p", "2222", "--", "one.example.org")),
        ("10.0.0.7:22", ("-p", "22", "--", "10.0.0.7")),
        ("[fe80::1%eth0]:22", ("-p", "22", "--", "fe80::1%eth0")),
    ],
)
def test_a_host_may_have_a_user_and_a_port(written: str, options: tuple[str, ...]) -> None:
    assert ssh_hosts.parse(written).options == options


@pytest.mark.parametrize(
    "written", ["", "-oProxyCommand=x", "me@-one", "-l@one", "one two", "one:port", "a;b", "$(x)", "::1", "one\n"]
)
def test_what_is_no_host_is_refused(written: str) -> None:
    with pytest.raises(UserError, match=r"\[user@\]host:port"):
        ssh_hosts.parse(written)


def test_names_know_no_capitals() -> None:
    with pytest.raises(UserError, match="One, one: a host twice"):
        ssh_hosts.chosen(SshSettings(hosts=["one", "two", "One"]))


@pytest.mark.parametrize(("text", "names", "slots"), [(DEEPSPEED, ["one", "two"], 4), (OPENMPI, ["one", "two"], 2)])
def test_a_hostfile_of_deepspeed_or_open_mpi_is_read(text: str, names: list[str], slots: int, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text(text)
    hosts = ssh_hosts.chosen(SshSettings(hostfile=str(tmp_path / "hostfile")))
    assert [host.name for host in hosts] == names
    assert ssh_hosts.slots(hosts) == slots


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one slots=4\ntwo sluts=4\n", "line 2: 'sluts=4'"),
        ("# none\n", "names no host"),
        ("one slots=4\n-two slots=4\n", "line 2: '-two' is no host"),
    ],
)
def test_a_hostfile_that_says_something_else_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError, match=said):
        ssh_hosts.chosen(SshSettings(hostfile=str(tmp_path / "hostfile")))


def test_a_hostfile_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"launcher\.hostfile="):
        ssh_hosts.chosen(SshSettings(hostfile=str(tmp_path / "hostfile")))


def test_slots_that_differ_are_refused_with_the_number_that_all_have() -> None:
    hosts = (ssh_hosts.parse("one", 4), ssh_hosts.parse("two", 8), ssh_hosts.parse("three"))
    with pytest.raises(UserError, match=r"one 4, two 8, three none(.|\n)*launcher\.procs=4"):
        ssh_hosts.slots(hosts)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "has no hosts"),
        ({"hosts": ["one"], "hostfile": "hosts"}, "both"),
        ({"hosts": ["one", "me@one"]}, "a host twice"),
        ({"hosts": ["localhost", "two"]}, r"launcher\.address="),
        ({"hosts": ["one", "two"], "address": "127.0.0.1"}, r"launcher\.address="),
    ],
)
def test_hosts_that_cannot_meet_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ssh_hosts.chosen(SshSettings(**settings))


def test_two_ports_of_one_machine_are_two_hosts() -> None:
    assert len(ssh_hosts.chosen(SshSettings(hosts=["one:22", "one:2222"]))) == 2
