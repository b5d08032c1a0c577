"""Settings of OFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from loomtune.settings import option

BLOCK_SIZE = 32
"""Inputs that are rotated together, where nothing is said."""


@dataclass
class OftSettings:
    """Orthogonal fine-tuning: the inputs of linear layers are rotated, block by block."""

    block_size: Optional[int] = option(  # noqa: UP045
        None, f"inputs that are rotated together, which must divide each layer's; null: {BLOCK_SIZE}, or by `blocks`"
    )
    blocks: Optional[int] = option(None, "instead: how many blocks the inputs of each layer make")  # noqa: UP045
    block_share: bool = option(False, "all blocks of a layer are rotated alike")
    neumann_terms: int = option(
        5, "terms of the series for the inverse in Cayley's formula, quick and almost orthogonal; 0: solved exactly"
    )
    targets: list[str] = option(
        ["all-linear"],
        "linear layers: `all-linear` (all but the output head), names such as `q_proj`, or patterns such as `*.mlp.*`",
    )


@dataclass
class CoftSettings(OftSettings):
    """Constrained orthogonal fine-tuning: rotations stay near the identity."""

    eps: float = option(6e-5, "largest norm of what a layer's blocks are rotated by, over the root of their number")
