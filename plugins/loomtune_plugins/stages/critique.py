"""Constitutional AI, first stage: answers that a model criticises by a principle, and writes anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loomtune.contracts import Row
from loomtune.errors import Fault
from loomtune_plugins.endpoint import Ask, Message, Reply
from loomtune_plugins.stages.answer import sample
from loomtune_plugins.stages.asking import Asking, page
from loomtune_plugins.stages.asking_settings import CritiqueSettings
from loomtune_plugins.stages.principles import Constitution, Principle
from loomtune_plugins.stages.talks import Talk


class Critique(Asking):
    """Bai et al. 2022, "Constitutional AI", section 3.1: a principle drawn anew for each critique and its revision.

    Only the last revision is learned; what led to it stays beside it in `critiques`. A row without an answer gets one
    of the same model first.
    """

    name = "critique"
    settings: CritiqueSettings

    def __init__(self, settings: CritiqueSettings) -> None:
        super().__init__(settings)
        self._constitution = Constitution(settings.constitution, f"{self.key}.constitution")

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        if self.settings.rounds < 1:
            yield Fault(f"{self.key}.rounds={self.settings.rounds} revises nothing", f"set {self.key}.rounds above 0")

    def check(self) -> None:
        self._constitution.check("critique")
        super().check()

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {self._constitution.fingerprint()}"

    def work(self, talks: Sequence[Talk]) -> None:
        for talk in talks:
            if talk.dropped is None and len(talk.answers) > 1:
                talk.drop("several answers", "critique revises one")
        sample(self, [talk for talk in talks if not talk.answers], 1)
        for talk in talks:
            talk.notes = [{"draft": one} for one in talk.answers]
        for number in range(self.settings.rounds):
            self._round(talks, number)

    def _round(self, talks: Sequence[Talk], number: int) -> None:
        def criticised(talk: Talk, reply: Reply) -> None:
            talk.notes.append({"principle": self._drawn(talk, number).name, "critique": reply.text})

        def revised(talk: Talk, reply: Reply) -> None:
            talk.notes[-1]["revision"] = reply.text

        self.asked(talks, lambda talk: self._first(talk, number), criticised, whole=False)
        self.asked(talks, lambda talk: self._second(talk, number), revised, whole=True)

    def _drawn(self, talk: Talk, number: int) -> Principle:
        principles = self._constitution.principles("critique")
        return principles[talk.draw(self.settings.seed, "principle", number) % len(principles)]

    def _first(self, talk: Talk, number: int) -> Ask:
        return self.question(talk, self._before(talk, number), "critique", number)

    def _second(self, talk: Talk, number: int) -> Ask:
        wanted = self._constitution.prompt("revision", **self._drawn(talk, number).says)
        criticised = {"role": "assistant", "content": talk.notes[-1]["critique"]}
        turns = [*self._before(talk, number), criticised, {"role": "user", "content": wanted}]
        return self.question(talk, turns, "revision", number)

    def _before(self, talk: Talk, number: int) -> list[Message]:
        """The conversation, the answer as it is by now, and the request for a critique."""
        note = talk.notes[number]
        wanted = self._constitution.prompt("critique", **self._drawn(talk, number).says)
        answer = {"role": "assistant", "content": note.get("revision", note.get("draft", ""))}
        return [*talk.turns, answer, {"role": "user", "content": wanted}]

    def made(self, talk: Talk) -> Row:
        draft, *rounds = talk.notes
        trail: dict[str, Any] = {"by": self.writer, **draft, "rounds": rounds}
        return talk.answered(rounds[-1]["revision"], critiques=trail)

    def page(self, row: Row) -> str:
        if not (trail := row.get("critiques")):
            return ""
        steps = [("draft", trail["draft"])]
        for number, one in enumerate(trail["rounds"], start=1):
            steps += [(f"critique {number}, by: {one['principle']}", one["critique"])]
            steps += [(f"revision {number}", one["revision"])]
        return page(f"{row.get('origin', '')}, by {trail['by']}", ("prompt", _asked(row)), *steps)


def _asked(row: Row) -> str:
    from loomtune_plugins.endpoint import told

    return told(Talk.of(row).turns)
