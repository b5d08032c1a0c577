"""Who sees whom in a batch of segments."""

import torch
from torch import Tensor

from loomtune.contracts import Batch
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT


def additive(batch: Batch, dtype: torch.dtype) -> Tensor:
    """`(rows, 1, length, length)`: 0 where a token sees another, the least finite number elsewhere.

    Finite: a row of scores that are all -inf is NaN after softmax, and so are its gradients.
    """
    zero = torch.zeros((), dtype=dtype, device=batch.tokens.device)
    return zero.where(visible(batch), torch.finfo(dtype).min).unsqueeze(1)


def is_causal(batch: Batch) -> bool:
    """True where every row is one chain of segments, parents first, padded on the right only.

    Then all tokens before a token are its own segment's and its ancestors', and no padding stands before a real token.
    """
    segments = batch.segments
    before, after = segments[:, :-1], segments[:, 1:]
    parent_of_after = _parents(batch)[after]  # padding (-1) reads the last entry; it is let through below by itself
    follows = (after == NO_SEGMENT) | (after == before) | ((parent_of_after == before) & (before != NO_SEGMENT))
    rootless = (segments[:, :1] == NO_SEGMENT) | (_parents(batch)[segments[:, :1]] == NO_PARENT)
    return bool(follows.all() & rootless.all())


def visible(batch: Batch) -> Tensor:
    """`(rows, length, length)` bool: whether the token of a query (second axis) sees that of a key (third).

    Its own segment up to itself and its ancestors' segments, which stand before it in the same row; padding sees
    itself, so that no row of scores is empty.
    """
    segments = batch.segments
    sees = _ancestors(_parents(batch))[segments.unsqueeze(2), segments.unsqueeze(1)]
    real = segments != NO_SEGMENT
    sees = sees & real.unsqueeze(2) & real.unsqueeze(1)
    length = segments.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    return (sees & torch.ones_like(itself).tril()) | itself


def _parents(batch: Batch) -> Tensor:
    """`(segments + 1,)`: parents with one more entry at the end, which `NO_SEGMENT` (-1) reads."""
    return torch.cat([batch.parents, batch.parents.new_full((1,), NO_PARENT)])


def _ancestors(parents: Tensor) -> Tensor:
    """`(segments, segments)` bool: whether the second is the first or one of its ancestors."""
    count = len(parents)
    found = torch.eye(count, dtype=torch.bool, device=parents.device)
    segment, above = torch.arange(count, device=parents.device), parents
    while bool((above != NO_PARENT).any()):
        has = above != NO_PARENT
        segment, above = segment[has], above[has]
        found[segment, above] = True
        above = parents[above]
    return found
