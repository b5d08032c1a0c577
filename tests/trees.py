"""Batches laid by hand: rows of segments that continue each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loomtune.contracts import Batch
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT


@dataclass
class Piece:
    """A segment in a row: its tokens, and which piece of the row it continues."""

    tokens: Sequence[int]
    parent: int = NO_PARENT


def lay(*rows: Sequence[Piece]) -> Batch:
    """Rows of pieces, padded on the right; positions count along parents."""
    length = max(sum(len(piece.tokens) for piece in row) for row in rows)
    tokens, positions, segments, parents = [], [], [], []
    for row in rows:
        first, ends = len(parents), []
        row_tokens, row_positions, row_segments = [], [], []
        for number, piece in enumerate(row):
            start = ends[piece.parent] if piece.parent != NO_PARENT else 0
            ends.append(start + len(piece.tokens))
            parents.append(first + piece.parent if piece.parent != NO_PARENT else NO_PARENT)
            row_tokens += list(piece.tokens)
            row_positions += range(start, ends[-1])
            row_segments += [first + number] * len(piece.tokens)
        padding = length - len(row_tokens)
        tokens.append(row_tokens + [0] * padding)
        positions.append(row_positions + [0] * padding)
        segments.append(row_segments + [NO_SEGMENT] * padding)
    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        segments=torch.tensor(segments),
        parents=torch.tensor(parents),
        sample_of_segment=torch.arange(len(parents)),
        part=torch.zeros(len(parents), dtype=torch.long),
        predict_from=nothing,
        target=nothing,
        row=nothing,
        sample_numbers=nothing,
    )


def draw(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
