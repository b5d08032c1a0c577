"""A function of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Answer, Data
from loomtune.errors import UserError
from loomtune_plugins.rewards.scored import Failure, Scored, Scores
from loomtune_plugins.rewards.settings import FunctionSettings
from loomtune_plugins.rewards.workers.pool import Pool

if TYPE_CHECKING:
    from loomtune.run import Run


class Function(Scores):
    """What a function says, called as `function(prompt, completion, row)`, or with a list of each."""

    name = "function"

    def __init__(self, settings: FunctionSettings) -> None:
        place, _, name = settings.function.rpartition(":")
        if not place or not name:
            what = f"reward.function.function={settings.function!r} names no function"
            raise UserError.of(what, "set it to package.module:function, or to path/file.py:function")
        if settings.batch < 0 or settings.workers < 0 or not settings.seconds > 0 or not settings.memory >= 0:
            what = "reward.function: batch, workers and memory are 0 or more, seconds more than 0"
            raise UserError.of(what, "mend them")
        if place.endswith(".py"):
            place = str(Path(place).expanduser().absolute())
        self.weight = settings.weight
        self._settings = settings
        memory = int(settings.memory * 2**30)
        self.pool = Pool(target=f"{place}:{name}", seconds=settings.seconds, memory=memory, workers=settings.workers)

    def check(self, data: Data) -> None:
        """Raises UserError where there is no such function, or it cannot be imported."""
        refused = self.pool.check()
        self.pool.close()
        if refused:
            what = f"reward.function.function={self._settings.function} cannot be had: {refused}"
            raise UserError.of(what, "mend the module, or its name; its folder is looked for from where you are")

    def found(self, run: Run, answers: Sequence[Answer]) -> Sequence[Scored]:
        given = [_given(run, answer) for answer in answers]
        if not self._settings.batch:
            return self._called(run, [(1, one) for one in given])
        starts = range(0, len(given), self._settings.batch)
        parts = [given[start : start + self._settings.batch] for start in starts]
        found = self._called(run, [(len(part), tuple(map(list, zip(*part, strict=True)))) for part in parts])
        # An answer on which the function fails must not take with it those that it was asked about together with.
        alone = [i for i, one in enumerate(found) if isinstance(one, Failure)] if self._settings.batch > 1 else []
        again = self._called(run, [(1, tuple([part] for part in given[i])) for i in alone])
        for i, score in zip(alone, again, strict=True):
            found[i] = score
        return found

    def _called(self, run: Run, calls: Sequence[tuple[int, tuple[Any, ...]]]) -> list[Scored]:
        return [score for scores in self.pool.call(calls, lambda: run.stop.requested) for score in scores]


def _given(run: Run, answer: Answer) -> tuple[str, str, dict[str, Any]]:
    """The prompt as the model was asked, its completion, and the row."""
    return run.tokenizer.decode(answer.prompt, special=True), answer.text, dict(answer.row)
