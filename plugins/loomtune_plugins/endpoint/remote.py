"""Any OpenAI-compatible service."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from loomtune.errors import Fault, UserError
from loomtune_plugins.endpoint.asking import Ask, Done, Gate, Reply, Source
from loomtune_plugins.endpoint.patience import Again, backoff, judged
from loomtune_plugins.endpoint.replies import Unusable, reply_of
from loomtune_plugins.endpoint.settings import EndpointSettings
from loomtune_plugins.endpoint.turns import NEXT, plain

if TYPE_CHECKING:
    import ssl

    import httpx2

SHOWN = {"chat": 20, "completions": 5}
"""The most of the likeliest tokens that services give."""

SEEDS = 1 << 31
"""How many seeds every service takes."""

DOWN = 4
"""Questions that are given up one after the other, with no answer between, until a service counts as down."""

LONGEST = 32 << 20
"""Bytes of an answer; no answer is longer."""

_HERE = ("localhost", "127.0.0.1", "::1")


class Remote(Source):
    """Asks several questions at once, each until it is answered or its attempts are used up.

    Every attempt ends: a connection, a silence and an answer as a whole have limits of their own.
    """

    def __init__(self, settings: EndpointSettings, prefix: str) -> None:
        self._settings, self._prefix = settings, prefix
        path = "chat/completions" if settings.api == "chat" else "completions"
        self._url = f"{settings.url.rstrip('/')}/{path}"

    def check(self) -> None:
        """Looks at the key alone: whether the service is there is seen when it is asked."""
        if not self._key().isascii() or any(one.isspace() for one in self._key()):
            what = f"the variable {self._settings.key_variable} holds no key: blanks or letters that no header takes"
            raise UserError.of(what, "export the key alone")

    def identity(self) -> Mapping[str, Any]:
        return {"url": self._url}

    def request(self, ask: Ask) -> dict[str, Any]:
        chat, options = self._settings.api == "chat", bool(ask.options)
        said = (
            {"messages": [dict(one) for one in ask.messages]} if chat else {"prompt": plain(ask.messages, ask.opening)}
        )
        body: dict[str, Any] = {"model": self._settings.model, **said, "max_tokens": 1 if options else ask.max_tokens}
        if options:  # at temperature 1 it is the same whether a service shows them before or after dividing by it
            shown = SHOWN[self._settings.api]
            body |= {"temperature": 1.0, **({"logprobs": True, "top_logprobs": shown} if chat else {"logprobs": shown})}
        else:
            body |= {"temperature": ask.temperature, "top_p": ask.top_p, **({} if chat else {"stop": [NEXT]})}
            body |= {"seed": ask.draw % SEEDS} if ask.temperature else {}
        return {name: value for name, value in {**body, **self._settings.body}.items() if value is not None}

    def answer(self, asks: Sequence[Ask], done: Done, gate: Gate) -> None:
        """In a thread with an event loop of its own, for there may be one around us."""
        raised: list[BaseException] = []

        def work() -> None:
            try:
                asyncio.run(_Round(self, asks, done, gate).run())
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)  # signals are heard in between
        if raised:
            raise raised[0]

    def client(self) -> httpx2.AsyncClient:
        """Connections, as many as there may be. A proxy of the environment is not for this machine itself."""
        import httpx2

        limits, chosen = httpx2.Limits(max_connections=self._settings.concurrency), self._settings
        timeout = httpx2.Timeout(chosen.silent_seconds, connect=chosen.connect_seconds, pool=None)
        here = urlsplit(self._url).hostname in _HERE
        return httpx2.AsyncClient(timeout=timeout, limits=limits, trust_env=not here, verify=self._certificates)

    @cached_property
    def _certificates(self) -> ssl.SSLContext:
        """Whom this machine trusts; reading that takes longer than many an answer."""
        import httpx2

        return httpx2.create_ssl_context()

    async def attempt(self, client: httpx2.AsyncClient, ask: Ask) -> Reply | Again:
        """One request. Raises UserError where none would be answered."""
        import httpx2

        try:
            async with asyncio.timeout(self._settings.answer_seconds):
                status, headers, body = await self._sent(client, json.dumps(self.request(ask)).encode())
        except TimeoutError:
            return Again(f"no whole answer came within {self._settings.answer_seconds:g} s")
        except (httpx2.RequestError, OSError) as error:
            return Again(self._hidden(f"{type(error).__name__}: {error}"))
        if status == 200:
            return self._understood(body, ask)
        verdict = judged(status, headers, body, self._prefix)
        if isinstance(verdict, Fault):
            raise UserError.of(self._hidden(verdict.what), verdict.cure)
        if isinstance(verdict, str):
            return Reply(failed=self._hidden(verdict), refused=True)
        return Again(self._hidden(verdict.why), verdict.wait)

    def _understood(self, body: bytes, ask: Ask) -> Reply | Again:
        try:
            return reply_of(body, ask)
        except Unusable as error:
            return Again(self._hidden(str(error)), lasting=error.lasting, tokens=error.tokens)

    async def _sent(self, client: httpx2.AsyncClient, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        body = bytearray()
        async with client.stream("POST", self._url, content=content, headers=headers) as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > LONGEST:
                    break
            return response.status_code, dict(response.headers), bytes(body)

    def _key(self) -> str:
        return os.environ.get(self._settings.key_variable, "").strip() if self._settings.key_variable else ""

    def _hidden(self, text: str) -> str:
        """A message without the key, which some services repeat, nor what is left of it where the message was cut."""
        if not (key := self._key()):
            return text
        text = text.replace(key, "***")
        return re.sub(re.escape(key[:8]) + r"\S*", "***", text) if len(key) >= 16 else text


class _Round:
    """Some questions on their way."""

    def __init__(self, remote: Remote, asks: Sequence[Ask], done: Done, gate: Gate) -> None:
        self._remote, self._asks, self._done, self._gate = remote, asks, done, gate
        self._settings, self._numbers = remote._settings, iter(range(len(asks)))
        self._lost, self._free = 0, 0.0
        self._why = ""
        self._stopped: BaseException | None = None

    async def run(self) -> None:
        """Ends when each is answered or has failed; where none can be answered, when those under way are over."""
        async with self._remote.client() as client:
            await asyncio.gather(*(self._worker(client) for _ in range(self._settings.concurrency)))
        if self._stopped:
            raise self._stopped

    async def _worker(self, client: httpx2.AsyncClient) -> None:
        for number in self._left():
            try:
                self._done(number, await self._answered(client, self._asks[number]))
            except BaseException as error:
                self._stopped = self._stopped or error
                if not isinstance(error, Exception):
                    raise

    def _left(self) -> Iterator[int]:
        while self._stopped is None and (number := next(self._numbers, None)) is not None:
            yield number

    async def _answered(self, client: httpx2.AsyncClient, ask: Ask) -> Reply:
        """The reply to one, or why there is none after all attempts."""
        tokens, why, lasting = (0, 0), self._why, False
        for attempt in range(self._attempts()):
            self._gate()
            await asyncio.sleep(max(0.0, self._free - time.monotonic()))
            outcome = await self._remote.attempt(client, ask)
            if isinstance(outcome, Reply):
                self._lost = 0
                return _with(outcome, tokens)
            why, lasting = outcome.why, outcome.lasting
            tokens = (tokens[0] + outcome.tokens[0], tokens[1] + outcome.tokens[1])
            if self._stopped or not await self._waited(attempt, outcome):
                break
        if not lasting:
            self._lost, self._why = self._lost + 1, why
        return Reply(failed=why, refused=lasting, tokens=tokens)

    def _attempts(self) -> int:
        """How often the next question is tried: once after one was given up, not at all after several in a row."""
        return self._settings.retries + 1 if not self._lost else int(self._lost < DOWN)

    async def _waited(self, attempt: int, outcome: Again) -> bool:
        """Waits before the next attempt, if there is one. A service that asks for time is left alone by all."""
        attempts = min(self._settings.retries, 1 if outcome.lasting else self._settings.retries)
        if attempt >= attempts or outcome.wait > self._settings.longest_wait:
            return False
        wait = max(outcome.wait, backoff(attempt, self._settings.first_wait, self._settings.longest_wait))
        if outcome.wait:
            self._free = max(self._free, time.monotonic() + outcome.wait)
        await asyncio.sleep(wait)
        return True


def _with(reply: Reply, tokens: tuple[int, int]) -> Reply:
    """A reply that was paid for in earlier attempts too."""
    return replace(reply, tokens=(reply.tokens[0] + tokens[0], reply.tokens[1] + tokens[1]))
