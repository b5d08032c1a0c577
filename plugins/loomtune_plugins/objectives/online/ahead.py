"""Completions that are begun before the batch that comes first is learned from: `rollout.ahead=1`.

So they are drawn by a policy that is one batch older than the one that learns from them, while that one is trained. The
old log-probabilities are those that the engine drew them with: nobody can read that policy any more when they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loomtune.contracts import Completion, Drawn, Sample, Segment
from loomtune.errors import Preempted, UserError

if TYPE_CHECKING:
    from loomtune.run import Run

Begin = Callable[[Sequence[Drawn]], Callable[[], list[Completion]]]
"""Begins completions of prompts, and gives what waits for them."""


@dataclass(slots=True)
class Next:
    """The batch that comes next.

    follows: the visit of the prompt that is drawn after it; where another one is drawn, a guard rolled back, and these
    prompts are not met again. wait: for what was begun of it. completions: those that have come.
    """

    drawn: Sequence[Drawn]
    follows: int = 0
    wait: Callable[[], list[Completion]] | None = None
    completions: list[Completion] | None = None

    @property
    def begun(self) -> bool:
        """Whether the policy of that time has drawn it, or is drawing it."""
        return self.wait is not None or self.completions is not None

    def completed(self) -> list[Completion]:
        """Its completions, which are waited for once. Raises Preempted meanwhile, and may be asked again."""
        if self.completions is None:
            assert self.wait is not None, "it was begun"
            self.completions = self.wait()
        return self.completions

    def plain(self) -> dict[str, Any]:
        """As JSON holds it. Waits for its completions, whoever asks to leave: that policy is not there again."""
        while self.begun and self.completions is None:
            with suppress(Preempted):
                self.completed()
        drawn = [{"row": d.row, "sample": d.sample.plain(), "given": d.given, "visit": d.visit} for d in self.drawn]
        made = self.completions
        return {"drawn": drawn, "follows": self.follows, "completions": None if made is None else _packed(made)}

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Next:
        """What `plain` described."""
        drawn = [Drawn(d["row"], Sample.parse(d["sample"]), d["given"], d["visit"]) for d in plain["drawn"]]
        made = plain["completions"]
        return cls(drawn, plain["follows"], completions=None if made is None else _unpacked(made))


class Turn:
    """The making of one batch's steps: it is completed, and then the next one is begun.

    drawn: the batch's prompts. older: whether they were completed by a policy that has learned since.
    """

    def __init__(self, kept: Next | None, drawn: Sequence[Drawn], run: Run, *, last: bool) -> None:
        """kept: what the turn before left. drawn: the prompts that come next. last: nothing is trained on after it."""
        follows = kept is not None and kept.follows == drawn[0].visit
        self._now = kept if kept and follows else Next(drawn)
        self._next = Next(drawn if follows else run.draw()) if follows or not last else None
        self._last, self._seen = last, self._next.drawn if self._next else drawn
        self.drawn, self.older = self._now.drawn, self._now.begun

    def completed(self, drawn: Sequence[Drawn], begin: Begin) -> list[Completion]:
        """Completions of the batch, after which the next one is begun; or of others, which are drawn besides."""
        if drawn is not self.drawn:
            self._seen = drawn
            return begin(drawn)()
        if not self._now.begun:
            self._now.wait = begin(drawn)
        made = self._now.completed()
        if self._next and not self._last:
            self._next.wait = begin(self._next.drawn)
        return made

    def over(self) -> Next | None:
        """What the next turn begins with."""
        if self._next:
            self._next.follows = self._seen[-1].visit + 1
        return self._next

    @staticmethod
    def old(columns: Mapping[str, Any]) -> Any:
        """The old log-probabilities of a batch. Raises UserError where its engine does not say them."""
        if "rollout" not in columns:
            what = "rollout.ahead=1 needs the log-probabilities that tokens were drawn with, and the engine says none"
            raise UserError.of(what, "set rollout.ahead=0, or choose another rollout=")
        return columns["rollout"]


def _packed(completions: Sequence[Completion]) -> dict[str, Any]:
    """As segments of one sample, which a checkpoint packs."""
    return Sample(tuple(_segment(one) for one in completions)).plain()


def _segment(one: Completion) -> Segment:
    columns = {"log_probs": np.asarray(one.log_probs, np.float32)}
    return Segment(np.asarray(one.tokens, np.int32), np.ones(len(one.tokens), np.bool_), columns=columns)


def _unpacked(plain: Mapping[str, Any]) -> list[Completion]:
    return [Completion(s.tokens.tolist(), s.columns["log_probs"].tolist()) for s in Sample.parse(plain).segments]
