"""Which failures are tried again, after how long, and which mean that nothing can be had here."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from loomtune.errors import Fault
from loomtune_plugins.endpoint.replies import message_of

PASSING = (408, 409, 425, 429)
"""Below 500, what another attempt may not meet; all above is."""

SPENT = ("insufficient_quota", "billing_hard_limit", "billing_not_active")
"""In a 429 that no waiting mends. `billing` alone stands in the advice of limits that a minute's waiting mends."""


@dataclass(frozen=True, slots=True)
class Again:
    """An attempt that failed. wait: seconds that the service asks for; lasting: whether the next would fail alike."""

    why: str
    wait: float = 0.0
    lasting: bool = False
    tokens: tuple[int, int] = (0, 0)


def judged(status: int, headers: Mapping[str, str], body: bytes, prefix: str) -> Again | str | Fault:
    """Of a status that is not 200: to be tried again; why this one question is refused; or why any would be."""
    said = message_of(body)
    told = f"status {status}{f': {said}' if said else ''}"
    if status == 429 and any(word in said.lower() or word.encode() in body for word in SPENT):
        return Fault(f"{prefix}.url answers with {told}", "see to the account, and start the same command again")
    if status in PASSING or status >= 500:
        return Again(told, _asked_for(headers))
    if status in (401, 402, 403):
        cure = f"export the service's key in the variable that {prefix}.key_variable names"
        return Fault(f"{prefix}.url answers with {told}", cure)
    if status in (404, 405):
        return Fault(f"{prefix}.url answers with {told}", f"see {prefix}.url (often ends with /v1), .model and .api")
    if status < 400:
        where = headers.get("location", "")
        return Fault(f"{prefix}.url answers with {told}{f', to {where}' if where else ''}", f"set {prefix}.url to that")
    return told


def _asked_for(headers: Mapping[str, str]) -> float:
    """Seconds of `Retry-After`, a number or a date (RFC 9110, section 10.2.3); 0 where it says nothing."""
    said = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(said)
    except (ValueError, OverflowError):
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def backoff(attempt: int, first: float, longest: float) -> float:
    """Seconds before the next attempt: doubled each time, half of it by chance, lest all come at once."""
    return min(longest, first * 2.0**attempt) * random.uniform(0.5, 1.0)
