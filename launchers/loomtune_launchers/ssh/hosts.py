"""Which hosts launcher=ssh goes to: a list in the settings, or a hostfile."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from loomtune.errors import Fault, UserError
from loomtune_launchers.ssh.settings import SshSettings

_FORM = re.compile(
    r"(?:(?P<user>\w[\w.\\-]*)@)?(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%\w+)?)\]|(?P<name>\w[\w.-]*))(?::(?P<port>\d+))?"
)
"""Neither a user nor a host begins with a dash, which ssh would take for an option."""

_SLOTS = re.compile(r"slots=(\d+)")
_MOST = re.compile(r"max[-_]slots=\d+")  # Open MPI's bound on oversubscription, which we never do

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Host:
    """A host as it was written. slots: processes that a hostfile gives it; 0: it does not say."""

    written: str
    name: str
    user: str = ""
    port: str = ""
    slots: int = 0

    @property
    def options(self) -> tuple[str, ...]:
        """What ssh is told of it, the name last."""
        user = ("-l", self.user) if self.user else ()
        return (*user, *(("-p", self.port) if self.port else ()), "--", self.name)


def parse(written: str, slots: int = 0) -> Host:
    """Raises UserError where it is no `[user@]host[:port]`."""
    found = _FORM.fullmatch(written)
    if found is None:
        cure = "write [user@]host or [user@]host:port, an IPv6 address in brackets"
        raise UserError.of(f"{written!r} is no host", cure)
    name = found["v6"] or found["name"]
    return Host(written, name, found["user"] or "", found["port"] or "", slots)


def chosen(settings: SshSettings) -> tuple[Host, ...]:
    """The hosts, in order. Raises UserError where there is none, where both ways or one host twice are given."""
    if bool(settings.hosts) == bool(settings.hostfile):
        said = "both launcher.hosts and launcher.hostfile name hosts" if settings.hosts else "launcher=ssh has no hosts"
        raise UserError.of(said, "set one of launcher.hosts=[one,other] and launcher.hostfile=FILE")
    hosts = _read(Path(settings.hostfile)) if settings.hostfile else tuple(parse(host) for host in settings.hosts)
    places = [(host.name.lower(), host.port) for host in hosts]
    twice = sorted({host.written for host, place in zip(hosts, places, strict=True) if places.count(place) > 1})
    if twice:
        raise UserError.of(
            f"{', '.join(twice)}: a host twice", "name each once; launcher.procs= says how many run there"
        )
    if len(hosts) > 1 and (settings.address or hosts[0].name) in LOOPBACK:
        said = f"other hosts cannot reach the first one as {settings.address or hosts[0].name}"
        raise UserError.of(said, "set launcher.address= to the name or address by which they do")
    return hosts


def _read(path: Path) -> tuple[Host, ...]:
    if not path.is_file():
        raise UserError.of(f"launcher.hostfile={path} is no file", "name a file of lines `host slots=N`")
    hosts, faults = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if words := line.partition("#")[0].split():
            try:
                hosts.append(_entry(words))
            except UserError as error:
                faults += [Fault(f"{path}, line {number}: {fault.what}", fault.cure) for fault in error.faults]
    if faults or not hosts:
        raise UserError(*faults or [Fault(f"{path} names no host", "write lines `host slots=N`")])
    return tuple(hosts)


def _entry(words: list[str]) -> Host:
    slots = 0
    for word in words[1:]:
        if found := _SLOTS.fullmatch(word):
            slots = int(found[1])
        elif not _MOST.fullmatch(word):
            raise UserError.of(f"{word!r} says nothing to launcher=ssh", "write `host slots=N`")
    return parse(words[0], slots)


def slots(hosts: tuple[Host, ...]) -> int:
    """Processes on each host by the hostfile, 0 where it says nothing. Raises UserError where they differ."""
    given = sorted({host.slots for host in hosts})
    if len(given) > 1:
        said = ", ".join(f"{host.name} {host.slots or 'none'}" for host in hosts)
        least = next((number for number in given if number), 1)
        raise UserError.of(f"the hosts have different slots: {said}", f"set launcher.procs={least}, the same on all")
    return given[0]
