"""Which rows make an optimizer step, who computes them, and how they become tensors.

What a step holds is a pure function of (seed, epoch, index); ranks, micro-batches and sorting only decide where and
when a row is computed. Nothing here may change the maths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from loomtune.contracts import Batch, Placement, Sample
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT
from loomtune.world import derive

if TYPE_CHECKING:
    from loomtune.run import Run

CPU_TOKENS = 1024
"""Tokens of a micro-batch that `batch.micro=auto` chooses on a CPU: they keep a core busy and fit into its cache."""


@dataclass(frozen=True, slots=True)
class Order:
    """The endless sequence of rows: epoch after epoch, each in an order of its own. Sample number -> row."""

    seed: int
    rows: int

    def row(self, number: int) -> int:
        """The row of the number-th sample of the run, counted from 0."""
        epoch, index = divmod(number, self.rows)
        return int(_permutation(self.seed, epoch, self.rows)[index])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    return np.random.default_rng(derive(seed, "order", epoch)).permutation(rows)


@dataclass(frozen=True, slots=True)
class MicroLimit:
    """How much a rank computes at once: at most so many rows, and (0: any number) so many tokens, padding included."""

    rows: int
    tokens: int = 0


def place(numbers: Sequence[int], lengths: Sequence[int], replicas: int, limit: MicroLimit) -> list[list[Placement]]:
    """Micro-batches of every replica: rows sorted by length, so that little is padded, and dealt out evenly.

    numbers, lengths: of the step's samples. Every replica gets equally many micro-batches, some of them empty: a
    sharded engine's collectives must meet. Pure, and the same on every rank.
    """
    by_length = sorted(range(len(numbers)), key=lambda i: (-lengths[i], numbers[i]))
    share = max(1, -(-len(numbers) // replicas))
    groups = _groups(by_length, lengths, MicroLimit(min(limit.rows, share), limit.tokens))
    rounds = max(1, -(-len(groups) // replicas))
    placed: list[list[Placement]] = [[Placement(()) for _ in range(rounds)] for _ in range(replicas)]
    for i, group in enumerate(groups):
        turn, seat = divmod(i, replicas)
        replica = seat if turn % 2 == 0 else replicas - 1 - seat  # to and fro: the long ones do not all meet one rank
        placed[replica][turn] = Placement(tuple(numbers[j] for j in group))
    return placed


def _groups(order: Sequence[int], lengths: Sequence[int], limit: MicroLimit) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in order:  # the first of a group is its longest: the others are padded to it
        room = groups and len(groups[-1]) < limit.rows
        if room and (not limit.tokens or (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= limit.tokens):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def collate(samples: Sequence[Sample], numbers: Sequence[int], pad_id: int) -> Batch:
    """Samples as one micro-batch: one row a sample, its segments one after the other, padded at the right.

    Without samples: one padding token and no target, so that every engine still has something to compute.
    """
    length = max((sample.length for sample in samples), default=1)
    rows = max(1, len(samples))
    tokens = np.full((rows, length), pad_id, np.int64)
    positions, segments = np.zeros((rows, length), np.int64), np.full((rows, length), NO_SEGMENT, np.int64)
    parents: list[int] = []
    owners: list[int] = []
    predict_from: list[NDArray[np.int64]] = []
    target: list[NDArray[np.int64]] = []
    row_of: list[NDArray[np.int64]] = []
    for row, sample in enumerate(samples):
        first, column = len(parents), 0
        ends: list[tuple[int, int]] = []  # of each segment: its last column, and its sample's tokens up to there
        for segment in sample.segments:
            size = len(segment.tokens)
            before, seen = (NO_PARENT, 0) if segment.parent == NO_PARENT else ends[segment.parent]
            here = slice(column, column + size)
            tokens[row, here], segments[row, here] = segment.tokens, len(parents)
            positions[row, here] = np.arange(seen, seen + size)
            at = np.flatnonzero(segment.is_target)
            predict_from.append(row * length + np.where(at == 0, before, column + at - 1))
            target.append(segment.tokens[at].astype(np.int64))
            row_of.append(np.full(len(at), len(parents), np.int64))
            parents.append(NO_PARENT if segment.parent == NO_PARENT else first + segment.parent)
            owners.append(row)
            column += size
            ends.append((column - 1, seen + size))
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        parents=torch.tensor(parents, dtype=torch.int64),
        sample_of_segment=torch.tensor(owners, dtype=torch.int64),
        predict_from=_joined(predict_from),
        target=_joined(target),
        row=_joined(row_of),
        sample_numbers=torch.tensor(list(numbers), dtype=torch.int64),
        columns=_numbers(samples),
    )


def _joined(parts: list[NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.int64))


def _numbers(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    names = samples[0].numbers.keys() if samples else ()
    return {name: torch.tensor([sample.numbers[name] for sample in samples], dtype=torch.float32) for name in names}


def step_batches(run: Run, numbers: Sequence[int], order: Order, limit: MicroLimit) -> list[Batch]:
    """This rank's micro-batches of the training samples of these numbers, on its device."""
    samples = run.splits["train"]
    rows = {number: order.row(number) for number in numbers}
    lengths = [int(samples.lengths[rows[number]]) for number in numbers]
    mine = place(numbers, lengths, run.world.replicas, limit)[run.world.replica]
    pad = run.tokenizer.pad_id
    batches = [collate([samples[rows[n]] for n in placement.numbers], placement.numbers, pad) for placement in mine]
    return [batch.to(run.world.device) for batch in batches]


def evaluation_batches(run: Run, split: str, limit: int = 0) -> list[Batch]:
    """This rank's micro-batches of a whole split, or of its first rows, on its device."""
    samples = run.splits[split]
    count = min(len(samples), limit) if limit else len(samples)
    lengths = [int(length) for length in samples.lengths[:count]]
    mine = place(range(count), lengths, run.world.replicas, micro_limit(run))[run.world.replica]
    pad = run.tokenizer.pad_id
    batches = [collate([samples[n] for n in placement.numbers], placement.numbers, pad) for placement in mine]
    return [batch.to(run.world.device) for batch in batches]


def micro_limit(run: Run) -> MicroLimit:
    """The micro-batch that the settings ask for; `auto` starts from all of a rank's rows and a budget of tokens."""
    micro = run.settings.batch.micro
    if isinstance(micro, int):
        return MicroLimit(micro)
    return MicroLimit(run.settings.batch.size, run.token_budget)
