"""What was answered, by whom, and what is wrong with it: plain data, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FAULT = "fault"
WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and what would mend it. level: `fault` or `warning`."""

    level: str
    what: str
    cure: str


@dataclass(frozen=True, slots=True)
class Answers:
    """What ranks answered.

    nodes: name to its ranks, in order. said: phase to rank to what it found; a rank that found nothing is left out.
    quick: whether the measurements were short.
    """

    nodes: Mapping[str, Sequence[int]]
    said: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    quick: bool = False

    def node(self, rank: int) -> str:
        """The name of the rank's node."""
        return next(name for name, ranks in self.nodes.items() if rank in ranks)

    def of_nodes(self, phase: str) -> dict[str, Any]:
        """What the first rank of each node found, which alone looks at what is the node's."""
        said = self.said.get(phase, {})
        return {name: said[ranks[0]] for name, ranks in self.nodes.items() if ranks[0] in said}

    def by_node(self, phase: str) -> dict[str, dict[int, Any]]:
        """What the ranks of each node found."""
        said = self.said.get(phase, {})
        found = {name: {rank: said[rank] for rank in ranks if rank in said} for name, ranks in self.nodes.items()}
        return {name: of_node for name, of_node in found.items() if of_node}


def names(nodes: Iterable[str]) -> str:
    """Names for people; of many, some."""
    there = list(dict.fromkeys(nodes))
    return ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")


def odd_ones(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that have another value than most; of equally many, those that differ from the first."""
    counted = Counter(map(repr, values.values()))
    if len(counted) < 2:
        return {}
    usual = max(counted, key=counted.__getitem__)  # the first seen of equals
    return {name: value for name, value in values.items() if repr(value) != usual}


def usual(values: Mapping[str, Any]) -> Any:
    """The value that most have."""
    return next(value for name, value in values.items() if name not in odd_ones(values))
