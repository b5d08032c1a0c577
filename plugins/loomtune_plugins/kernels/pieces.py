"""Attention under a mask, piece by piece: the queries of a segment meet only the keys that it sees.

Under an explicit mask torch multiplies every query of a row by every key and throws most of it away. A pair of P, C and
R tokens, prompt and answers, takes P² + C(P + C) + R(P + R) products in pieces and (P + C + R)² in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loomtune.contracts import Batch
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT

SHORT = 256
"""Tokens of a row up to which a mask is better used whole: each piece costs as much besides as 2,500 products."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one segment in a row, or a row's padding.

    size: how many. sees: numbers, within the row, of the pieces that hold all that they see; itself is the last. mask:
    `(1, size, tokens of those)`, to be added.
    """

    size: int
    sees: tuple[int, ...]
    mask: Tensor


class InPieces(Tensor):
    """A mask that knows its pieces: scaled dot product attention by it is computed piece by piece.

    To everything else it is a tensor, as `torch.nn.attention.bias.CausalBias` is: it goes through a model's code
    unseen, and who makes another mask of it has a plain one.
    """

    rows: Sequence[Sequence[Piece]]

    @classmethod
    def of(cls, mask: Tensor, batch: Batch) -> Tensor:
        """The mask of a batch, in pieces where they pay: on a CPU, in long rows.

        mask: `(rows, 1, length, length)`, to be added.
        """
        if type(mask) is not Tensor or mask.device.type != "cpu" or mask.shape[-1] <= SHORT:
            return mask
        made = mask.as_subclass(cls)
        parents = batch.parents.tolist()
        made.rows = [list(_pieces(mask[i], row, parents)) for i, row in enumerate(batch.segments)]
        return made

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        mask = given.get("attn_mask")
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.scaled_dot_product_attention and isinstance(mask, cls):
                return _attend(mask.rows, *args, **given)
            return function(*args, **given)


def _pieces(mask: Tensor, segments: Tensor, parents: Sequence[int]) -> Iterator[Piece]:
    """Those of a row. mask: `(1, length, length)`. segments: `(length,)`."""
    places: list[slice] = []
    seen: dict[int, tuple[int, ...]] = {}  # by segment: the pieces of its ancestors, and its own
    runs = torch.unique_consecutive(segments, return_counts=True)
    for segment, size in zip(*(each.tolist() for each in runs), strict=True):
        begin = places[-1].stop if places else 0
        parent = NO_PARENT if segment == NO_SEGMENT else parents[segment]
        above = () if parent == NO_PARENT else seen.get(parent, ())  # a parent without tokens is seen by nobody
        seen[segment] = (*above, len(places))
        places.append(slice(begin, begin + size))
        part = torch.cat([mask[:, places[-1], places[i]] for i in seen[segment]], -1)
        yield Piece(size, seen[segment], part)


def _attend(rows: Sequence[Sequence[Piece]], query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
    """As `scaled_dot_product_attention`: `(rows, heads, length, width)` each."""
    each = zip(rows, *(torch.split(tensor, 1) for tensor in (query, key, value)), strict=True)
    return torch.cat([_row(pieces, *tensors, others=others) for pieces, *tensors in each])


def _row(pieces: Sequence[Piece], *tensors: Tensor, others: Mapping[str, Any]) -> Tensor:
    """tensors: query, key and value of the row."""
    sizes = [piece.size for piece in pieces]
    queries, keys, values = (torch.split(tensor, sizes, 2) for tensor in tensors)
    found = []
    for piece, asked in zip(pieces, queries, strict=True):
        key, value = (torch.cat([parts[i] for i in piece.sees], 2) for parts in (keys, values))
        attended = F.scaled_dot_product_attention(asked, key, value, **{**others, "attn_mask": piece.mask})
        found.append(attended.transpose(1, 2))
    return torch.cat(found, 1).transpose(1, 2)  # laid in memory as torch's kernel leaves it
