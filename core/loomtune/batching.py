"""How samples become tensors: this rank's micro-batches of a step or of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from loomtune.contracts import Batch, Placement, Sample, Segment
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT
from loomtune.placement import MicroLimit, laid_out, place, tokens

if TYPE_CHECKING:
    from loomtune.run import Run

CPU_TOKENS = 1024
"""Tokens of a micro-batch that `batch.micro=auto` chooses on a CPU: they keep a core busy and fit into its cache."""


def collate(
    samples: Sequence[Sample],
    numbers: Sequence[int],
    pad_id: int,
    like: Sample | None = None,
    rows: Sequence[int] | None = None,
) -> Batch:
    """Samples as one micro-batch: in each row one after the other, so its segments, padded at the right.

    A sample alone in its row takes a row for each of its trees.

    Without samples: one padding token and no target, so that every engine still has something to compute.
    like: any sample of the step; a batch without samples has its columns too.
    rows: how many samples each row holds, in their order; None: one each.
    """
    places, count, length = _laid(samples, [1] * len(samples) if rows is None else rows)
    tokens = np.full((count, length), pad_id, np.int64)
    positions, segments = np.zeros_like(tokens), np.full_like(tokens, NO_SEGMENT)
    targets = _Targets()
    for owner, (sample, starts) in enumerate(zip(samples, places, strict=True)):
        first = len(targets.parents)
        targets.part += sample.parts or range(len(sample.segments))
        trees = iter(starts)
        ends: list[tuple[int, int]] = []  # of each segment: its last column, and its sample's tokens up to there
        for segment in sample.segments:
            if segment.parent == NO_PARENT:
                row, column = next(trees)
            size = len(segment.tokens)
            before, seen = (NO_PARENT, 0) if segment.parent == NO_PARENT else ends[segment.parent]
            assert seen or not segment.is_target[:1].any(), "nothing precedes this target, so nothing can predict it"
            here = slice(column, column + size)
            tokens[row, here], segments[row, here] = segment.tokens, len(targets.parents)
            positions[row, here] = np.arange(seen, seen + size)
            targets.add(segment, first, owner, row * length + column, row * length + before)
            column += size
            ends.append((column - 1 if size else before, seen + size))
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        parents=torch.tensor(targets.parents, dtype=torch.int64),
        sample_of_segment=torch.tensor(targets.owners, dtype=torch.int64),
        part=torch.tensor(targets.part, dtype=torch.int64),
        predict_from=_joined(targets.predict_from, np.int64),
        target=_joined(targets.target, np.int64),
        row=_joined(targets.row, np.int64),
        sample_numbers=torch.tensor(list(numbers), dtype=torch.int64),
        columns=_columns(samples, like),
    )


def _laid(samples: Sequence[Sample], rows: Sequence[int]) -> tuple[list[list[tuple[int, int]]], int, int]:
    """(row and first column of each sample's trees, rows, tokens of the longest row); a row and a token at least."""
    places, row, longest, left = [], -1, 1, iter(samples)
    for size in rows:
        row, column = row + 1, 0
        for sample in islice(left, size):
            starts: list[tuple[int, int]] = []
            for length in sample.trees:
                if starts and size == 1:
                    row, column = row + 1, 0
                starts.append((row, column))
                column += length
                longest = max(longest, column)
            places.append(starts)
    return places, max(1, row + 1), longest


@dataclass(slots=True)
class _Targets:
    """What is gathered of a batch's segments, in their order."""

    parents: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    part: list[int] = field(default_factory=list)
    predict_from: list[NDArray[np.int64]] = field(default_factory=list)
    target: list[NDArray[np.int64]] = field(default_factory=list)
    row: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, segment: Segment, first: int, owner: int, begin: int, before: int) -> None:
        """Takes a segment. first: the number of its sample's first. begin: the flat place of its first token.
        before: that of its parent's last, which predicts this first token."""
        at = np.flatnonzero(segment.is_target)
        self.predict_from.append(np.where(at == 0, before, begin + at - 1))
        self.target.append(segment.tokens[at].astype(np.int64))
        self.row.append(np.full(len(at), len(self.parents), np.int64))
        self.parents.append(NO_PARENT if segment.parent == NO_PARENT else first + segment.parent)
        self.owners.append(owner)


def _joined(parts: Sequence[NDArray[Any]], kind: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, kind), *parts]).astype(kind))


def _columns(samples: Sequence[Sample], like: Sample | None) -> dict[str, torch.Tensor]:
    """Numbers, one a sample, and the segments' columns, one a target; without samples the same names, of length 0."""
    example = samples[0] if samples else like
    if example is None:
        return {}
    joined = {n: _joined([np.array([s.numbers[n] for s in samples])], np.float32) for n in example.numbers}
    segments = [segment for sample in samples or [example] for segment in sample.segments if segment.is_target.any()]
    for name in sorted({name for segment in example.segments for name in segment.columns}):
        parts = [segment.columns[name] for segment in segments]
        assert all(len(p) == s.is_target.sum() for p, s in zip(parts, segments, strict=True)), f"{name}: one a target"
        whole = np.concatenate(parts, dtype=np.float32) if parts else np.zeros(0, np.float32)
        joined[name] = torch.from_numpy(whole if samples else whole[:0])
    return joined


def step_batches(run: Run, samples: Sequence[Sample], numbers: Sequence[int], limit: MicroLimit) -> list[Batch]:
    """This rank's micro-batches of an optimizer step's samples, on its device. numbers: of their visits."""
    laid = laid_out(samples, limit)
    mine = place(range(len(laid)), [tokens(sample, limit) for sample in laid], run.world.replicas, limit)
    return _collated(run, mine[run.world.replica], laid, numbers)


def _collated(run: Run, placed: Sequence[Placement], samples: Any, numbers: Sequence[int]) -> list[Batch]:
    pad, like = run.tokenizer.pad_id, samples[0] if len(samples) else None
    batches = []
    for placement in placed:
        here, rows = placement.numbers, [len(row) for row in placement.rows]
        batches.append(collate([samples[i] for i in here], [numbers[i] for i in here], pad, like, rows))
    return [batch.to(run.world.device) for batch in batches]


def evaluation_batches(run: Run, split: str, limit: int = 0) -> list[Batch]:
    """This rank's micro-batches of a whole split, or of its first rows, on its device."""
    samples = run.splits[split]
    count = min(len(samples), limit) if limit else len(samples)
    most = micro_limit(run)
    if not count or len(samples[0].segments) == 1:
        lengths = [int(length) for length in samples.lengths[:count]]
        mine = place(range(count), lengths, run.world.replicas, most)[run.world.replica]
        return _collated(run, mine, samples, range(count))
    whole = run.objective.together([samples[i] for i in range(count)], run.max_length)
    return step_batches(run, whole, range(count), most)


def micro_limit(run: Run) -> MicroLimit:
    """The micro-batch that the settings ask for; `auto` starts from all of a rank's rows and a budget of tokens.

    A packed row holds at most `Run.max_length` tokens, and with `auto` no more than the budget.
    """
    settings, micro = run.settings, run.settings.batch.micro
    packed = run.max_length if settings.packing else 0
    share = {"always": True, "never": False}.get(settings.batch.share)
    if isinstance(micro, int):
        return MicroLimit(micro, packed=packed, share=share)
    return MicroLimit(settings.batch.size, run.token_budget, min(packed, run.token_budget), share)
