"""What ranks print goes through pipes of their agent, which stamps every line and appends it to their logs."""

from __future__ import annotations

import fcntl
import os
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from loomtune_launchers.watching import ranklogs

LONGEST = 1 << 20
"""Bytes after which a line is written though it has not ended."""

QUIET = 1.0
"""Seconds after which the beginning of a line is written though it has not ended: a rank may hang just there."""

_SIZE = 1 << 20  # of a pipe, so that a rank rarely waits for the disk
_CHUNK = 1 << 16
_DRAINED = 5.0  # seconds for what is left in the pipes at the end


@dataclass
class _Log:
    """A rank's file, which both of its streams go to."""

    path: Path
    stamp: str = ""
    broken: bool = False

    def append(self, host: bytes, pieces: list[tuple[bytes, bytes]]) -> None:
        """Writes (stream, text) of one moment. A full disk ends no run: what cannot be written is told once."""
        self.stamp = max(self.stamp, ranklogs.stamp(time.time()))  # a clock that is set back does not mix lines up
        head = self.stamp.encode() + b" " + host + b" "
        try:
            with self.path.open("ab", buffering=0) as file:
                _write_all(file.fileno(), b"".join(head + kind + b" " + text + b"\n" for kind, text in pieces))
        except OSError as error:
            if not self.broken:
                print(f"loomtune: {self.path} cannot be written: {error}", file=sys.stderr, flush=True)  # noqa: T201
            self.broken = True


@dataclass
class _Stream:
    """One pipe. kind: o or e. echo: where it is repeated as it is, -1 for nowhere."""

    fd: int
    kind: bytes
    log: _Log
    echo: int = -1
    partial: bytes = b""
    heard: float = field(default_factory=time.monotonic)

    def take(self, host: bytes, data: bytes) -> None:
        """Repeats and writes what came; keeps the beginning of a line that has not ended."""
        if self.echo >= 0:
            try:
                _write_all(self.echo, data)
            except OSError:  # whoever listened has gone
                self.echo = -1
        *lines, self.partial = (self.partial + data).split(b"\n")
        self.heard = time.monotonic()
        if lines:
            self.log.append(host, [(self.kind, line) for line in lines])
        if len(self.partial) >= LONGEST:
            self.flush(host)

    def flush(self, host: bytes) -> None:
        """Writes the beginning of a line that has not ended."""
        if self.partial:
            self.log.append(host, [(self.kind.upper(), self.partial)])
            self.partial = b""


class Pipes:
    """The pipes of one group of ranks, and the thread that empties them. folder: of this node, for the pipes."""

    def __init__(self, folder: Path, host: str = "") -> None:
        self._folder = folder
        self._host = (host or socket.gethostname()).encode()
        self._streams: list[_Stream] = []
        self._selector = selectors.DefaultSelector()
        self._stop, self._wake = os.pipe()
        self._selector.register(self._stop, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True, name="loomtune-logs")

    def rank(self, number: int, log: Path, echo: bool) -> tuple[str, str]:
        """The pipes for a rank's output and errors. echo: whether this process repeats them as its own."""
        log.parent.mkdir(parents=True, exist_ok=True)
        file = _Log(log)
        return self._pipe(number, b"o", file, 1 if echo else -1), self._pipe(number, b"e", file, 2 if echo else -1)

    def _pipe(self, number: int, kind: bytes, log: _Log, echo: int) -> str:
        path = self._folder / f"{number}.{kind.decode()}"
        os.mkfifo(path, 0o600)
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # for writing too, so that it never ends while ranks come and go
        with suppress(OSError, AttributeError):  # Linux alone has it, and a user may have used up the share
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _SIZE)
        stream = _Stream(fd, kind, log, echo)
        self._streams.append(stream)
        self._selector.register(fd, selectors.EVENT_READ, stream)
        return str(path)

    def start(self) -> None:
        """Begins to read, once all ranks have their pipes."""
        self._thread.start()

    def watch(self, pid: int, ended: Callable[[float], object]) -> None:
        """Tells when a process ends, at once, so that the first of several is known."""
        with suppress(OSError, AttributeError):  # Linux 5.3 and later
            self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, ended)

    def finish(self) -> None:
        """Reads what is left, and ends. Whoever wrote must have ended."""
        os.close(self._wake)
        if self._thread.ident is not None:  # otherwise nothing was ever started
            self._thread.join()
        keys = list(self._selector.get_map().values())
        self._selector.close()
        for key in keys:
            os.close(key.fd)

    def _run(self) -> None:
        while self._heard(QUIET):
            silent = time.monotonic() - QUIET
            for stream in self._streams:
                if stream.heard < silent:
                    stream.flush(self._host)
        until = time.monotonic() + _DRAINED
        while any(_read(stream, self._host) for stream in self._streams) and time.monotonic() < until:
            pass
        for stream in self._streams:
            stream.flush(self._host)

    def _heard(self, seconds: float) -> bool:
        """Takes what has come; False where it is time to end."""
        goes_on = True
        for key, _ in self._selector.select(seconds):
            if key.fd == self._stop:
                goes_on = False
            elif isinstance(key.data, _Stream):
                _read(key.data, self._host)
            else:
                key.data(time.time())
                self._selector.unregister(key.fd)
                os.close(key.fd)
        return goes_on


def _read(stream: _Stream, host: bytes) -> bool:
    try:
        data = os.read(stream.fd, _CHUNK)
    except BlockingIOError:
        return False
    stream.take(host, data)
    return bool(data)


def _write_all(fd: int, data: bytes) -> None:
    """Writes everything, also to a terminal that somebody made non-blocking."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            select.select([], [fd], [], 1.0)
