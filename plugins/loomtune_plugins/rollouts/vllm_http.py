"""One server, asked by HTTP with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0
"""Seconds between two tries: each pause is twice the one before."""

TRIES = 4
"""How often what fails inside a server (500) is tried: a worker that is lost stays so, and a wrong request wrong."""


class Refused(Exception):
    """A server understood and said no. status: HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Unanswered(Exception):
    """No answer that can be used came within the time; says what came instead."""


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Server:
    """Where one server listens, and how long it is waited for.

    patience: seconds for a request with all its tries. A key in VLLM_API_KEY, which vLLM reads too, is sent along.
    """

    def __init__(self, url: str, patience: float) -> None:
        parts = urlsplit(url.rstrip("/"))
        self.url, self.patience = url.rstrip("/"), patience
        self._host, self._port, self._root = parts.hostname or "", parts.port, parts.path
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._gone = threading.Event()

    def ask(self, method: str, path: str, body: Any = None, *, again: bool = True, seconds: float = 0.0) -> Any:
        """The answer: what its JSON says, or text. Tried again where that can help, and where `again` allows.

        Raises Refused, Unanswered, or Cancelled where `cancel` was called meanwhile.
        """
        until, pause, tries, said = time.monotonic() + (seconds or self.patience), FIRST_PAUSE, 0, "nothing"
        while (left := until - time.monotonic()) > 0:
            if self._gone.is_set():
                raise Cancelled
            tries += 1
            try:
                status, said = self._once(method, path, body, left)
                if status < 400:
                    return _read(said)
                if status < 500 and status not in (408, 425, 429):
                    raise Refused(status, _message(said))
                said = f"HTTP {status}: {_message(said)}"
                if status == 500 and tries >= TRIES:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:
                said = f"{type(error).__name__}: {error}"
            if not again or time.monotonic() + pause > until:
                break
            self._gone.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if self._gone.is_set():
            raise Cancelled
        raise Unanswered(f"{self.url}{path} gave no answer in {tries} tries; the last ended with {said}")

    def _once(self, method: str, path: str, body: Any, seconds: float) -> tuple[int, str]:
        connection = self._kind(self._host, self._port, timeout=seconds)
        with self._lock:
            self._open.add(connection)
        try:
            if self._gone.is_set():
                raise Cancelled
            headers = {"Content-Type": "application/json", "Connection": "close"}
            if key := os.environ.get("VLLM_API_KEY"):
                headers["Authorization"] = f"Bearer {key}"
            connection.request(method, self._root + path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def cancel(self) -> None:
        """Ends what is under way, for good: vLLM stops generating for who hangs up."""
        self._gone.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)


def hang_up(servers: Sequence[Server]) -> None:
    """Ends what is under way with each of them."""
    for server in servers:
        server.cancel()


def _read(text: str) -> Any:
    """JSON, where it begins as JSON does; half of it is a ValueError. Some answers are empty, or plain words."""
    return json.loads(text) if text.lstrip()[:1] in ("{", "[", '"') else text


def _message(text: str) -> str:
    """vLLM's `{"error": {"message": ...}}` or FastAPI's `{"detail": ...}`, else the beginning of the text."""
    with suppress(ValueError, KeyError, TypeError):
        told = json.loads(text)
        error = told["error"] if "error" in told else told["detail"]
        return str(error["message"] if isinstance(error, dict) else error)
    return text.strip()[:300] or "no words"
