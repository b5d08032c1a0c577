"""Constitutional AI, second stage: the better of two answers, chosen by a model and a principle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from loomtune.contracts import Row
from loomtune.errors import Fault
from loomtune_plugins.endpoint import Ask, Message, Reply, told
from loomtune_plugins.stages.answer import sample
from loomtune_plugins.stages.asking import Asking, page
from loomtune_plugins.stages.asking_settings import PrincipledSettings
from loomtune_plugins.stages.principles import Constitution, Principle
from loomtune_plugins.stages.talks import Talk

LETTERS = ("A", "B")


class Principled(Asking):
    """Bai et al. 2022, "Constitutional AI", section 4.1: a multiple choice between two answers, by one principle each.

    Which answer is (A) is drawn for each row. The label is soft: the softmax of the log-probabilities of the two
    letters; after thinking aloud, when a model is too sure of itself, it is held within `clamp` and 1 - `clamp`.
    """

    name = "principled"
    settings: PrincipledSettings

    def __init__(self, settings: PrincipledSettings) -> None:
        super().__init__(settings)
        self._constitution = Constitution(settings.constitution, f"{self.key}.constitution")

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        if not 0 <= self.settings.clamp < 0.5:
            what = f"{self.key}.clamp={self.settings.clamp} leaves no choice"
            yield Fault(what, f"set {self.key}.clamp to 0 or more and below 0.5; 0.4 is its authors' value")

    def check(self) -> None:
        self._constitution.check("choice")
        super().check()

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {self._constitution.fingerprint()}"

    def work(self, talks: Sequence[Talk]) -> None:
        """Rows with two answers are judged as they are, whoever wrote these."""
        for talk in talks:
            if talk.dropped is None and len(talk.answers) > 2:
                talk.drop("more than two answers", f"{len(talk.answers)}")
            elif len(talk.answers) == 1:
                talk.answers = []
        sample(self, [talk for talk in talks if not talk.answers], 2)
        for talk in talks:
            if talk.dropped is None and len(set(talk.answers)) < 2:
                talk.drop("the answers are the same", "")
        for talk in talks:
            first = talk.draw(self.settings.seed, "order") % 2
            talk.notes = [{"by": self.writer, "principle": self._drawn(talk).name, "first": first}]
        if self.settings.thinks:
            self.asked(talks, self._thought, lambda talk, reply: _note(talk, reasoning=reply.text), whole=False)
        self.asked(talks, self._choice, self._chosen, whole=False)

    def _drawn(self, talk: Talk) -> Principle:
        principles = self._constitution.principles("choice")
        return principles[talk.draw(self.settings.seed, "principle") % len(principles)]

    def _thought(self, talk: Talk) -> Ask:
        return self.question(talk, [self._laid_out("reasoning", talk)], "reasoning")

    def _choice(self, talk: Talk) -> Ask:
        turns = [self._laid_out("choice", talk)]
        if self.settings.thinks:
            thought = {"role": "assistant", "content": talk.notes[0]["reasoning"]}
            verdict = {"role": "user", "content": self._constitution.prompt("verdict")}
            turns = [self._laid_out("reasoning", talk), thought, verdict]
        return Ask(messages=turns, options=LETTERS, opening=self._constitution.prompt("opening"))

    def _laid_out(self, prompt: str, talk: Talk) -> Message:
        first = talk.notes[0]["first"]
        places = {"a": talk.answers[first], "b": talk.answers[1 - first], "conversation": told(talk.turns)}
        return {"role": "user", "content": self._constitution.prompt(prompt, **places, **self._drawn(talk).says)}

    def _chosen(self, talk: Talk, reply: Reply) -> None:
        """Notes how likely the answer that is (A) is the better one."""
        a, b = (reply.log_probs[letter] for letter in LETTERS)
        p = 1 / (1 + math.exp(min(b - a, 700.0)))
        if self.settings.thinks:
            p = min(max(p, self.settings.clamp), 1 - self.settings.clamp)
        _note(talk, log_probs={"A": a, "B": b}, p=p)

    def made(self, talk: Talk) -> Row:
        """The likelier answer is `chosen`: its probability is never below a half."""
        note = talk.notes[0]
        p, letter = note.pop("p"), LETTERS[0]
        better = note.pop("first")
        if p < 0.5:
            p, better, letter = 1 - p, 1 - better, LETTERS[1]
        chosen, rejected = (talk.said(talk.answers[place]) for place in (better, 1 - better))
        judged: dict[str, Any] = {**note, "chosen": letter}
        return talk.prompted(chosen=chosen, rejected=rejected, probability=p, judgement=judged)

    def page(self, row: Row) -> str:
        if not (note := row.get("judgement")):
            return ""
        talk = Talk.of(row)
        chosen, rejected = talk.answers
        parts = [("prompt", told(talk.turns)), ("chosen", chosen), ("rejected", rejected)]
        parts += [("reasoning", note["reasoning"])] if "reasoning" in note else []
        title = f"{row.get('origin', '')}, {row['probability']:.3f} by: {note['principle']} ({note['by']})"
        return page(title, *parts)


def _note(talk: Talk, **more: Any) -> None:
    talk.notes[0].update(more)
