"""Which steps are traced. Without torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from loomtune.errors import UserError
from loomtune.plan import Finding
from loomtune.settings import Settings

CURE = "set profile.steps to a step, such as 10, or to the first and the last one, such as 10:12"


def window(text: str) -> tuple[int, int] | None:
    """First and last step of `10:12` or `10`; None of nothing. Raises UserError where it says neither."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if not found:
        raise UserError.of(f"profile.steps={text} names no steps", CURE)
    first, last = int(found[1]), int(found[2] or found[1])
    if first < 1 or last < first:
        raise UserError.of(f"profile.steps={text} holds no step: they count from 1 and upwards", CURE)
    return first, last


def findings(root: Settings, trackers: Collection[str]) -> Sequence[Finding]:
    """What is wrong or doubtful about the setting. trackers: those that are chosen."""
    try:
        asked = window(root.profile.steps)
    except UserError as error:
        return [Finding(fault.what, fault.cure) for fault in error.faults]
    if asked and "usage" not in trackers:
        what = f"profile.steps={root.profile.steps} has no effect without the tracker that traces"
        return [Finding(what, f"set tracker=[{','.join([*trackers, 'usage'])}]")]
    ends = min((steps for steps in (root.steps, root.stop_after) if steps), default=0)
    if asked and ends and asked[1] > ends:
        missed = "none of them" if asked[0] > ends else "not all of them"
        what = f"profile.steps={root.profile.steps} goes beyond step {ends}, the last: {missed} will be traced"
        return [Finding(what, f"set profile.steps to steps up to {ends}", fatal=False)]
    return []
