"""What can go wrong, one class for each remedy, under one root.

`exit_code` is the process' answer: 2 for what the user can mend, 1 for what failed, 75 for "start me again".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


class LoomtuneError(Exception):
    """Anything that loomtune raises on purpose."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a request, and what would mend it."""

    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what}\n    cure: {self.cure}"


class UserError(LoomtuneError):
    """The request cannot be carried out as it stands; every fault found is named at once, each with its cure."""

    exit_code = 2

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        super().__init__("\n".join(str(fault) for fault in faults))

    @classmethod
    def of(cls, what: str, cure: str) -> UserError:
        """An error of a single fault."""
        return cls(Fault(what, cure))


class RunFailed(LoomtuneError):
    """The run began and could not go on; what was committed before is intact."""


class PeerLost(RunFailed):
    """Another process is gone, hangs or cannot be reached; what was committed before is intact."""


class CheckpointError(LoomtuneError):
    """A checkpoint could not be written or is not what its manifest says."""


class ExportError(LoomtuneError):
    """What would leave is not what was trained; nothing of it is kept."""


class LeaseLost(LoomtuneError):
    """A newer attempt writes to this run's folder; this one must not."""


class Preempted(LoomtuneError):
    """The run was asked to leave; its steps, or what it read before the first, are kept: start it again."""

    exit_code = 75


def near(asked: str, known: Iterable[str]) -> str:
    """Says which known name was probably meant: ` Did you mean 'x'?`, or nothing where none is near."""
    matches = get_close_matches(asked, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
