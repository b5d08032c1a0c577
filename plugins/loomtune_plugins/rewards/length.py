"""How long an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Answer, Reward
from loomtune.errors import UserError
from loomtune_plugins.rewards.settings import LengthSettings

if TYPE_CHECKING:
    from loomtune.run import Run


class Length(Reward):
    """0 within bounds; outside, a penalty that grows linearly to 1.

    With `longest` and `margin` it is DAPO's soft overlong punishment (arXiv:2503.14476, equation 13), where `longest`
    is their L_max - L_cache and `margin` their L_cache.
    """

    def __init__(self, settings: LengthSettings) -> None:
        longest, shortest = settings.longest, settings.shortest
        if min(longest, shortest, settings.margin, settings.cut) < 0 or (longest and longest < shortest):
            said = f"shortest={shortest}, longest={longest}, margin={settings.margin}, cut={settings.cut:g}"
            what = f"reward.length makes no sense: {said}"
            raise UserError.of(what, "set shortest to at most longest, and none below 0")
        if not (longest or shortest or settings.cut):
            what = "reward=length has no bound, so that it says nothing"
            raise UserError.of(what, "set reward.length.longest, shortest, or cut")
        self.weight = settings.weight
        self._settings = settings

    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        return [-self._penalty(len(answer.tokens), answer.ended) for answer in answers]

    def _penalty(self, length: int, ended: bool) -> float:
        settings = self._settings
        over = length - settings.longest if settings.longest else 0
        outside = max(over, settings.shortest - length, 0)
        penalty = min(1.0, outside / max(1, settings.margin))
        return penalty if ended else max(penalty, settings.cut)
