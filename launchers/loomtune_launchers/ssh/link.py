"""One host over ssh: the program, what the other side says, and whether it still does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import IO, Any, TextIO

from loomtune.errors import UserError
from loomtune_launchers.ssh.hosts import Host
from loomtune_launchers.ssh.remote import BEAT, HELLO

TAIL = 15
"""Lines of what a host said last that are kept, to be shown where it fails."""


class Link:
    """An ssh program in a session of its own: a terminal's Ctrl-C comes to us alone, and it can ask for nothing."""

    def __init__(self, host: Host, command: tuple[str, ...]) -> None:
        self.host = host
        self.hello: dict[str, Any] | None = None
        self.tail: deque[str] = deque(maxlen=TAIL)
        self.heard = time.monotonic()
        self.ended = math.inf
        self.lost = False
        self._speaks = False
        self._sent = 0.0
        self._order: threading.Thread | None = None
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        except FileNotFoundError:
            raise UserError.of("there is no ssh program here", "install OpenSSH's client") from None
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()

    @property
    def code(self) -> int | None:
        """The program's exit code, None while it runs."""
        return self.process.poll()

    def order(self, text: str) -> None:
        """The first line; in a thread, since what is long waits for the connection."""
        self._order = threading.Thread(target=self._write, args=(text.encode() + b"\n",), daemon=True)
        self._order.start()

    def go(self, meeting: dict[str, Any]) -> None:
        """Lets the host begin; what its agent says is shown from now on."""
        self._speaks, self.heard = True, time.monotonic()
        self._write(f"go {json.dumps(meeting)}\n".encode())

    def stop(self, seconds: float) -> None:
        """Asks what runs there to leave, and has it ended after so many seconds."""
        self._write(f"stop {seconds:g}\n".encode())

    def beat(self, every: float) -> None:
        """Says that this side is here, if it is time to; while the order waits for the connection, nothing can."""
        if self._order and self._order.is_alive():
            return
        if time.monotonic() - self._sent >= every:
            self._sent = time.monotonic()
            self._write(BEAT)

    def silent(self, patience: float) -> bool:
        """Whether nothing came for that long, though the program still runs."""
        return self.code is None and time.monotonic() - self.heard > patience

    def close(self) -> None:
        """Ends the program; the other side sees its input end, at the latest when it has heard nothing for long."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.drained()

    def drained(self) -> None:
        """Once the program has ended: until all that it said has been read."""
        for reader in self._readers:
            reader.join(1)

    def _write(self, said: bytes) -> None:
        """A host that is gone hears nothing; whoever follows it sees that it is."""
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):
            while said:
                said = said[os.write(self.process.stdin.fileno(), said) :]

    def _read(self, stream: IO[bytes], shown: TextIO) -> None:
        rest = b""
        while said := os.read(stream.fileno(), 65536):
            self.heard = math.inf  # a terminal that takes nothing for a while (Ctrl-S) is not the host's silence
            *lines, rest = (rest + said.replace(BEAT, b"")).split(b"\n")
            for line in lines:
                self._take(line.decode(errors="replace"), shown)
            self.heard = time.monotonic()
        if rest:
            self._take(rest.decode(errors="replace"), shown)
        self.ended = min(self.ended, time.monotonic())

    def _take(self, line: str, shown: TextIO) -> None:
        """A login shell may have said something before the hello; it is kept for the case that there is none."""
        if self.hello is None and line.startswith(HELLO):
            self.hello = json.loads(line.removeprefix(HELLO))
        elif not self._speaks:
            self.tail.append(line.rstrip("\r"))
        else:
            if shown is sys.stderr:
                self.tail.append(line)
            with suppress(OSError, ValueError):  # whoever read our output has gone; the run goes on
                shown.write(f"{line}\n")  # in one piece: other hosts speak at the same time
                shown.flush()
