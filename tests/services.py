"""A service on this machine that answers as OpenAI's does, and misbehaves as it is told."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behave = Callable[[int, dict[str, Any]], str]
"""From the number of a request (of all, from 0) and its body to what is done with it."""

FAILURES = ("429", "500", "502", "503", "disconnect", "half", "no json", "empty", "no choices", "error as answer")


@dataclass
class Service:
    """bodies, headers: of all requests, in the order in which they came. most: that were there at once."""

    behave: Behave
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most: int = 0
    here: int = 0
    retry_after: str = "0.05"
    lock: Any = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def answered(self) -> int:
        return len(self.bodies)


def well(number: int, body: dict[str, Any]) -> str:
    return "well"


@contextmanager
def serving(behave: Behave = well, port: int = 0) -> Iterator[Service]:
    service = Service(behave)

    class Handler(_Handler):
        pass

    Handler.service = service
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    service.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"

    def log_message(self, *said: Any) -> None:
        return

    def do_POST(self) -> None:
        service = self.service
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with service.lock:
            number = len(service.bodies)
            service.bodies.append(body)
            service.headers.append(dict(self.headers))
            service.times.append(time.monotonic())
            service.here += 1
            service.most = max(service.most, service.here)
        try:
            self._do(service.behave(number, body), body)
        except OSError:
            self.close_connection = True
        finally:
            with service.lock:
                service.here -= 1

    def _do(self, what: str, body: dict[str, Any]) -> None:
        whole = json.dumps(answer(body)).encode()
        if what == "well":
            self._send(200, whole)
        elif what.isdigit():
            more = {"Retry-After": self.service.retry_after} if what == "429" and self.service.retry_after else {}
            said = f"status {what} with {self.headers.get('Authorization', '')}"
            self._send(int(what), json.dumps({"error": {"message": said}}).encode(), more)
        elif what == "disconnect":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif what == "half":
            self._send(200, whole[: len(whole) // 2], length=len(whole))
        elif what == "no json":
            self._send(200, b"<html>busy</html>")
        elif what == "cut json":
            self._send(200, whole[: len(whole) // 2])
        elif what == "empty":
            self._send(200, b"")
        elif what == "no choices":
            self._send(200, json.dumps({**answer(body), "choices": []}).encode())
        elif what == "error as answer":
            self._send(200, json.dumps({"error": {"message": "overloaded"}}).encode())
        elif what == "silent":
            time.sleep(30)
        elif what == "trickle":
            self._trickle(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole)
        elif what == "no text":
            choice = {"message": {"content": ""}, "finish_reason": "stop"}
            self._send(200, json.dumps({**answer(body), "choices": [choice]}).encode())
        elif what.startswith("say "):
            choice = {"message": {"content": what[4:]}, "finish_reason": "stop"}
            self._send(200, json.dumps({**answer(body), "choices": [choice]}).encode())
        elif what.startswith("slow"):
            time.sleep(float(what.split()[1]))
            self._send(200, whole)
        else:
            raise AssertionError(what)

    def _trickle(self, data: bytes) -> None:
        """A byte at a time, the header too, so that no silence is ever long."""
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.05)

    def _send(self, status: int, body: bytes, more: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        if length is not None:
            self.close_connection = True


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """What is said is a function of the request alone."""
    known = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
    text = f"answer {known.hex()[:10]}"
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    if body.get("logprobs"):
        shown = {" A": -0.2 - known[0] / 100, "B": -0.3 - known[1] / 100, "\n": -6.0}
        if "messages" in body:
            top = [{"token": token, "logprob": value} for token, value in shown.items()]
            choice = {"message": {"content": "A"}, "logprobs": {"content": [{"token": " A", "top_logprobs": top}]}}
        else:
            choice = {"text": " A", "logprobs": {"top_logprobs": [shown]}}
        return {"choices": [{**choice, "finish_reason": "length"}], "usage": usage}
    said = {"message": {"content": text}} if "messages" in body else {"text": f" {text}\n\nHuman: x"}
    return {"choices": [{**said, "finish_reason": "stop"}], "usage": usage}
