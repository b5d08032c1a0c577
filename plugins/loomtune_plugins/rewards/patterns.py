"""Regular expressions that a user wrote."""

from __future__ import annotations

import re

from loomtune.errors import UserError


def compiled(reward: str, pattern: str) -> re.Pattern[str]:
    """The expression. Raises UserError where it is none."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        what = f"reward.{reward}.pattern={pattern!r} is no regular expression: {error}"
        raise UserError.of(what, f"mend reward.{reward}.pattern; in a shell, put it in single quotes") from error


def timed(reward: str, seconds: float) -> None:
    """Raises UserError where no answer could be matched in time."""
    if not seconds > 0:
        raise UserError.of(f"reward.{reward}.seconds={seconds} is no time", "set it to 1.0")
