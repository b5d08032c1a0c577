"""Prompts that a language model answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loomtune.contracts import Row
from loomtune.errors import Fault
from loomtune_plugins.stages.asking import Asking
from loomtune_plugins.stages.asking_settings import AnswerSettings
from loomtune_plugins.stages.talks import Talk


class Answer(Asking):
    """Puts a model's answers in the place of those that a row has."""

    name = "answer"
    settings: AnswerSettings

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        if self.settings.count < 1:
            yield Fault(f"{self.key}.count={self.settings.count} asks for nothing", f"set {self.key}.count to 1 or 2")
        if self.settings.count > 1 and not self.settings.temperature:
            what = f"{self.key}.temperature=0 gives {self.settings.count} times the same answer"
            yield Fault(what, f"set {self.key}.temperature above 0, or {self.key}.count=1")

    def work(self, talks: Sequence[Talk]) -> None:
        for talk in talks:
            talk.answers = []
        sample(self, talks, self.settings.count)

    def made(self, talk: Talk) -> Row:
        if self.settings.count == 1:
            return talk.answered(talk.answers[0], answered_by=self.writer)
        return talk.prompted(answers=[talk.said(one) for one in talk.answers], answered_by=self.writer)


def sample(stage: Asking, talks: Sequence[Talk], count: int) -> None:
    """Draws answers to each row, one after the other; two that are the same are no choice."""
    for number in range(count):
        stage.asked(
            talks,
            lambda talk, number=number: stage.question(talk, talk.turns, "answer", number),  # type: ignore[misc]
            lambda talk, reply: talk.answers.append(reply.text),
            whole=True,
        )
    for talk in talks:
        if talk.dropped is None and len(set(talk.answers)) < count:
            talk.drop("the answers are the same", "")
