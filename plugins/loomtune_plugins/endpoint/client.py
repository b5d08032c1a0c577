"""Asking a model, each question once: what was answered before is read from the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from loomtune.errors import UserError
from loomtune_plugins.endpoint.answers import Answers, default_folder, key_of
from loomtune_plugins.endpoint.asking import Ask, Reply, Source
from loomtune_plugins.endpoint.settings import EndpointSettings, faults


class Client:
    """A model with its kept answers.

    answers: those of its folder. asked: how many questions had to be asked.
    """

    def __init__(self, source: Source, settings: EndpointSettings, prefix: str) -> None:
        self.source, self._settings, self._prefix = source, settings, prefix
        self.answers = Answers(Path(settings.cache) if settings.cache else default_folder())
        self.asked = 0

    def check(self) -> None:
        """Raises UserError where the model cannot be there; nobody is asked."""
        self.source.check()

    def answer(self, asks: Sequence[Ask], leave: Callable[[], bool] = bool) -> list[Reply]:
        """A reply to each, in order; a question that failed has its reason in it, and is asked anew by another call.

        leave: asked before each attempt; where it says so no more are made.

        Raises UserError where no question can be answered, or no more may be asked; what was answered is kept.
        """
        identity = dict(self.source.identity())
        requests = [{**identity, "draw": ask.draw, "request": self.source.request(ask)} for ask in asks]
        keys = [key_of(request, ask.options) for request, ask in zip(requests, asks, strict=True)]
        replies = {key: kept for key in keys if (kept := self.answers.find(key)) is not None}
        missing = list({key: place for place, key in reversed(list(enumerate(keys))) if key not in replies}.values())
        missing.sort()

        def done(number: int, reply: Reply) -> None:
            place = missing[number]
            cost = self._cost(reply)
            if not reply.failed or cost:
                self.answers.keep(keys[place], requests[place], reply, cost)
            replies[keys[place]] = reply
            self.asked += 1

        if missing:
            self.source.answer([asks[place] for place in missing], done, lambda: self._gate(leave))
        return [replies[key] for key in keys]

    def _cost(self, reply: Reply) -> float:
        read, written = reply.tokens
        return (read * self._settings.input_price + written * self._settings.output_price) / 1e6

    def _gate(self, leave: Callable[[], bool]) -> None:
        """Raises UserError where one is asked to leave, or the cap is reached."""
        if leave():
            raise UserError.of("asked to leave while a model is asked", "start it again; what was answered is kept")
        most, spent = self._settings.max_cost, self.answers.cost
        if most and spent >= most:
            what = f"{self._prefix}.max_cost={most:g} is reached: the answers in {self.answers.path} cost {spent:.4f}"
            raise UserError.of(what, f"raise {self._prefix}.max_cost; what was answered is kept, and goes on counting")


def opened(settings: EndpointSettings, prefix: str) -> Client:
    """The client that settings describe. prefix: of their keys. Raises UserError naming all that is wrong with them."""
    if found := list(faults(settings, prefix)):
        raise UserError(*found)
    source: Source
    if settings.url:
        from loomtune_plugins.endpoint.remote import Remote

        source = Remote(settings, prefix)
    else:
        from loomtune_plugins.endpoint.local import Local

        source = Local(settings, prefix)
    return Client(source, settings, prefix)
