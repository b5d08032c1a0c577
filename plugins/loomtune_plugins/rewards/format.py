"""What an answer looks like."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict

from loomtune.contracts import Answer
from loomtune.errors import UserError
from loomtune_plugins.rewards.apart import MEMORY, Apart
from loomtune_plugins.rewards.patterns import compiled, timed
from loomtune_plugins.rewards.settings import FormatSettings
from loomtune_plugins.rewards.workers.pool import Pool

_FENCED = re.compile(r"\A```\w*[ \t]*\n(.*)\n[ \t]*```\Z", re.DOTALL)


class Format(Apart):
    """1 where the answer looks as it should."""

    name = "format"

    def __init__(self, settings: FormatSettings) -> None:
        if not (settings.pattern or settings.json or settings.keys):
            what = "reward=format does not say what an answer looks like"
            raise UserError.of(what, "set reward.format.pattern to a regular expression, or reward.format.json=true")
        if not (settings.pattern or settings.whole):
            raise UserError.of(
                "reward.format.whole=false is of a pattern, and there is none", "set reward.format.pattern"
            )
        compiled("format", settings.pattern)
        timed("format", settings.seconds)
        setup = {key: value for key, value in asdict(settings).items() if key not in ("weight", "seconds")}
        pool = Pool(target=f"{__name__}:Look", setup=setup, seconds=settings.seconds, memory=MEMORY)
        super().__init__(settings.weight, pool)

    def arguments(self, answer: Answer) -> tuple[str]:
        return (answer.text,)


class Look:
    """In a worker: whether a text looks so."""

    def __init__(self, *, pattern: str, whole: bool, json: bool, keys: Sequence[str], wrong: float) -> None:
        self._match = re.compile(pattern).fullmatch if whole else re.compile(pattern).search
        self._pattern, self._json, self._keys, self._wrong = pattern, json or bool(keys), keys, wrong

    def __call__(self, text: str) -> float:
        fits = not self._pattern or self._matches(text.strip())
        return 1.0 if fits and (not self._json or self._is_json(text.strip())) else self._wrong

    def _matches(self, text: str) -> bool:
        match = self._match(text)
        return match is not None and all((group or "").strip() for group in match.groupdict().values())

    def _is_json(self, text: str) -> bool:
        fenced = _FENCED.match(text)
        try:
            found = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            return False
        return not self._keys or (isinstance(found, dict) and found.keys() >= {*self._keys})
