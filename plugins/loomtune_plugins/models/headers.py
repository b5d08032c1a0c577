"""Names and shapes of weights, from the headers of their files alone. No torch, and no more read than the header."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loomtune.contracts.saved import stored_shapes

# Files of old versions hold rotary tables and position numbers, which modules compute today.
COMPUTED = ("rotary_emb.inv_freq", "position_ids", "masked_bias")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
HEAD = "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


def shapes(files: Iterable[Path]) -> Shapes:
    """Every weight of safetensors files, with the head that is tied to the embedding and so in none of them.

    Raises ValueError where a file is no safetensors file, OSError where it cannot be read.
    """
    found: Shapes = {}
    for file in files:
        found |= {name: shape for name, shape in stored_shapes(file).items() if not name.endswith(COMPUTED)}
    embedding = next((name for name in found if name.endswith(EMBEDDINGS)), None)
    if embedding is not None and not any(name.endswith(HEAD) for name in found):
        found[HEAD] = found[embedding]
    return found
