"""The final answer, beside the right one."""

from __future__ import annotations

import math
import re
from dataclasses import asdict

from loomtune.contracts import Answer, Data, Row
from loomtune.errors import UserError
from loomtune_plugins.rewards.apart import MEMORY, Apart
from loomtune_plugins.rewards.patterns import compiled, timed
from loomtune_plugins.rewards.settings import ExactSettings
from loomtune_plugins.rewards.workers.pool import Pool

_NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|(?<!\d)\.\d+")
_AROUND = " \t\n$€£%.,;:!*`'\""
"""What may stand around an answer without being part of it."""


class Exact(Apart):
    """1 where the answer comes to what the row says is right."""

    name = "exact"

    def __init__(self, settings: ExactSettings) -> None:
        compiled("exact", settings.pattern)
        timed("exact", settings.seconds)
        if not 0 <= settings.tolerance < 1:
            what = f"reward.exact.tolerance={settings.tolerance:g} is no part of a number"
            raise UserError.of(what, "set it to 0, or to 1e-6")
        self._reference = settings.reference
        apart = ("weight", "reference", "seconds")
        setup = {key: value for key, value in asdict(settings).items() if key not in apart}
        pool = Pool(target=f"{__name__}:Comparison", setup=setup, seconds=settings.seconds, memory=MEMORY)
        super().__init__(settings.weight, pool)

    def check(self, data: Data) -> None:
        """Raises UserError where training rows have no right answer."""
        first = next(iter(data.rows("train")), {})
        if not self._right(first):
            keys = f"`{self._reference}`" if self._reference else "`gold`, `chosen` or `completion`"
            what = f"reward=exact: the first row of `train` has no right answer in {keys}"
            raise UserError.of(what, f"set reward.exact.reference to one of: {', '.join(map(str, first))}")

    def arguments(self, answer: Answer) -> tuple[str, str]:
        return answer.text, self._right(answer.row)

    def _right(self, row: Row) -> str:
        keys = [self._reference] if self._reference else ["gold", "chosen", "completion"]
        return str(next((row[key] for key in keys if row.get(key) is not None), ""))


class Comparison:
    """In a worker: compares an answer with the right one."""

    def __init__(
        self, *, pattern: str, last: bool, numeric: bool, tolerance: float, wrong: float, missing: float
    ) -> None:
        self._pattern, self._last, self._numeric, self._tolerance = re.compile(pattern), last, numeric, tolerance
        self._wrong, self._missing = wrong, missing

    def __call__(self, text: str, right: str) -> float:
        found, wanted = self._final(text, last=self._last), self._final(right, last=False) or right
        if not wanted.strip():
            raise ValueError("a row has no right answer")
        if found is None:
            return self._missing
        return 1.0 if self._same(found, wanted) else self._wrong

    def _final(self, text: str, *, last: bool) -> str | None:
        """What the pattern matches last; else the last number, where that counts."""
        match = None
        for match in self._pattern.finditer(text):  # noqa: B007 - the last one stays
            pass
        if match is not None:
            return str(next((group for group in reversed(match.groups()) if group is not None), match.group()))
        numbers = _NUMBER.findall(text) if last else []
        return str(numbers[-1]) if numbers else None

    def _same(self, found: str, right: str) -> bool:
        one, other = number(found), number(right)
        if self._numeric and one is not None and other is not None:
            return math.isclose(one, other, rel_tol=self._tolerance, abs_tol=1e-12)
        return found.strip(_AROUND).casefold() == right.strip(_AROUND).casefold()


def number(text: str) -> float | None:
    """The number that a text is, whatever unit or punctuation stands around it; None where it is not just one."""
    found = _NUMBER.findall(text)
    return float(found[0].replace(",", "")) if len(found) == 1 else None
