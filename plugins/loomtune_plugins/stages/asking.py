"""What stages that ask a language model have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import PurePath

from loomtune.contracts import Dropped, Row, RowStage
from loomtune.errors import Fault, RunFailed, UserError
from loomtune_plugins.endpoint import Ask, Client, Message, Reply, opened
from loomtune_plugins.stages.asking_settings import ASIDE, CUTS, FAILURES, AskingSettings
from loomtune_plugins.stages.talks import Talk

VERSION = "1"
"""Of what these stages ask and make of it: raised when the same answers give other rows."""


FEW = 8
"""Rows that a filter may well refuse together, after others of which it answered."""


class Asking(RowStage):
    """Asks about some rows at a time, as many as a service or a batch takes at once.

    Every answer is kept by the client as soon as it is there: a stage that is killed, and called again, asks for the
    rest alone, and gives the same rows.
    """

    name: str
    """As `stage=` chooses it."""

    aside = ASIDE

    def __init__(self, settings: AskingSettings) -> None:
        self._heard: set[bool] = set()
        self.settings, self.key = settings, f"stage.{self.name}"
        self.client: Client = opened(settings, self.key)
        if faults := list(self.faults()):
            raise UserError(*faults)

    def faults(self) -> Iterator[Fault]:
        """Of settings."""
        for key, known in (("cut", CUTS), ("failures", FAILURES)):
            if (value := getattr(self.settings, key)) not in known:
                yield Fault(f"{self.key}.{key}={value} is unknown", f"set {self.key}.{key} to {' or '.join(known)}")
        for key, low in (("max_tokens", 1), ("temperature", 0)):
            if (value := getattr(self.settings, key)) < low:
                yield Fault(f"{self.key}.{key}={value} is less than {low}", f"set {self.key}.{key} to {low} or more")
        if not 0 < self.settings.top_p <= 1:
            yield Fault(f"{self.key}.top_p={self.settings.top_p} is no share", f"set {self.key}.top_p to 1")

    def check(self) -> None:
        self.client.check()

    def fingerprint(self) -> str:
        from loomtune_plugins.endpoint.answers import key_of

        return key_of(dict(self.client.source.identity()))

    def versions(self) -> Mapping[str, str]:
        return {f"rules of {self.name}": VERSION}

    def memory(self) -> int:
        return self.client.source.memory()

    def apply(self, rows: Sequence[Row]) -> Sequence[Row | Dropped]:
        talks = [Talk.of(row) for row in rows]
        self.work(talks)
        return [talk.dropped or self.made(talk) for talk in talks]

    @abstractmethod
    def work(self, talks: Sequence[Talk]) -> None:
        """Asks all that is to be asked about some rows."""

    @abstractmethod
    def made(self, talk: Talk) -> Row:
        """What became of a row that was not dropped."""

    @cached_property
    def writer(self) -> str:
        """Who answered, as rows tell it: a name, no place."""
        return self.settings.model if self.settings.url else PurePath(self.settings.model).name

    def question(self, talk: Talk, turns: Sequence[Message], *what: object) -> Ask:
        """One whose answer is text."""
        chosen = self.settings
        return Ask(
            messages=turns,
            max_tokens=chosen.max_tokens,
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            draw=talk.draw(chosen.seed, *what),
        )

    def asked(
        self, talks: Sequence[Talk], ask: Callable[[Talk], Ask], heard: Callable[[Talk, Reply], None], *, whole: bool
    ) -> None:
        """Asks one question about each row that still goes on. whole: whether an answer that was cut is of no use.

        Raises RunFailed where a question is left without an answer and rows are not to be dropped for it.
        """
        left = [talk for talk in talks if talk.dropped is None]
        asks = [ask(talk) for talk in left]
        replies = self.client.answer(asks)
        if self._all_refused(asks, replies):
            cure = f"see what {self.key}.body should add, or take out (seed: null); or ask another model"
            raise UserError.of(f"{self.key} is refused whatever it asks: {replies[0].failed}", cure)
        for talk, reply in zip(left, replies, strict=True):
            if reply.failed:
                self._failed(talk, reply)
            elif whole and not reply.ended and self.settings.cut == "drop":
                talk.drop("the model's answer was cut", f"at {self.settings.max_tokens} tokens")
            else:
                heard(talk, reply)

    def _all_refused(self, asks: Sequence[Ask], replies: Sequence[Reply]) -> bool:
        """Whether that is the request's fault, not the rows': where such were answered, a few may all be refused."""
        kinds = {bool(one.options) for one in asks}
        if not all(reply.refused for reply in replies):
            self._heard |= kinds
            return False
        return len(replies) > (FEW if kinds <= self._heard else 1)

    def _failed(self, talk: Talk, reply: Reply) -> None:
        """A question that is refused would be so again: its row goes. What else fails may be mended."""
        if reply.refused or self.settings.failures == "drop":
            talk.drop("the model gave no answer", reply.failed)
            return
        cure = (
            "the same command goes on, and asks nothing twice that was answered; "
            f"{self.key}.failures=drop drops such rows instead"
        )
        what = f"{self.key} has no answer about {talk.row.get('origin', 'a row')}: {reply.failed}"
        raise RunFailed(str(Fault(what, cure)))


def page(title: str, *parts: tuple[str, str]) -> str:
    """What people are shown of a row, as Markdown: a title, and texts under their names, quoted."""
    quoted = ("\n".join(f"> {line}" for line in text.splitlines()) for _, text in parts)
    told = (f"**{name}**\n\n{text}" for (name, _), text in zip(parts, quoted, strict=True))
    return "\n\n".join([f"## {title}", *told])
