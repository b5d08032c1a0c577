"""What a rehearsed step was seen to do, as plain data. All of it grows evenly with the blocks of a model.

No torch: a trace is made in one process and reasoned about in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CAUSES = (
    "parameters",  # this rank's, as they lie between steps
    "gradients",
    "optimizer",
    "gathered",  # parameters whole while a block computes, and buffers of collectives
    "activations",  # what the forward pass keeps for the backward pass
    "logits",  # of the head and the loss
    "temporary",  # what lives within an operation or a block's pass
    "roles",  # parameters of frozen networks beside the policy
    "rollout",  # caches of generation
    "overhead",  # workspaces of libraries on the device
)


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes that a rank's allocator gave out within a moment, and of what they were.

    causes: cause to bytes at that instant; they sum to `bytes`.
    """

    bytes: int
    causes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Collective:
    """Equal messages of a step.

    operation: all_gather, reduce_scatter, all_reduce, all_to_all, broadcast, send.
    bytes: of one message: the whole tensor as every rank of the group has it before or after (gathered, or unreduced).
    ranks: of the group, in its order. phase: of `loomtune.phases`. count: how many.
    hidden: whether computation that does not wait for it is there to hide it behind.
    """

    operation: str
    bytes: int
    ranks: tuple[int, ...]
    phase: str
    dtype: str
    count: float = 1
    hidden: bool = True


@dataclass(frozen=True, slots=True)
class Work:
    """Equal operations of a step.

    kind: matmul, attention, or other (bound by memory). dtype: of the factors. phase: of `loomtune.phases`.
    shape: of a matmul (batch, m, k, n); of attention (rows x heads, queries, keys, width, causal 0 or 1); else empty.
    flops: of one; bytes: that one reads and writes. again: whether it is a recomputation. count: how many.
    """

    kind: str
    dtype: str
    phase: str
    shape: tuple[int, ...]
    flops: float
    bytes: float
    again: bool = False
    count: float = 1


@dataclass(frozen=True, slots=True)
class Trace:
    """One optimizer step of one rank, from its birth on.

    moments: what a rank does, in order (`birth`, `forward`, `backward`, `optimizer`, further divided where the peak
    moves), to its peak. kept: cause to bytes between steps. host: the same of a host's memory, where layouts use it.
    tokens, targets: of the rank's step, padding left out of `targets` alone. parameters: of the policy, (all, trained,
    active for a token). blocks: traced. micro: batches in the step.
    """

    rank: int
    processes: int
    blocks: float
    moments: Mapping[str, Peak]
    kept: Mapping[str, int]
    host: Mapping[str, int]
    collectives: Sequence[Collective]
    work: Sequence[Work]
    tokens: int
    targets: int
    micro: int
    parameters: tuple[int, int, int]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def peak(self) -> Peak:
        """The largest of all moments."""
        return max(self.moments.values(), key=lambda one: one.bytes)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Trace:
        """From what `plain` gave."""
        lists = {
            "moments": {name: Peak(**peak) for name, peak in plain["moments"].items()},
            "collectives": [Collective(**{**one, "ranks": tuple(one["ranks"])}) for one in plain["collectives"]],
            "work": [Work(**{**one, "shape": tuple(one["shape"])}) for one in plain["work"]],
            "parameters": tuple(plain["parameters"]),
            "notes": tuple(plain["notes"]),
        }
        return cls(**{**plain, **lists})
