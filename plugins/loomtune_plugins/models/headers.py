"""Names and shapes of weights, from the headers of their files alone. No torch, and no more read than the header."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

LONGEST = 100_000_000
"""Bytes of a header that the format allows."""
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
        found |= {name: shape for name, shape in _header(file).items() if not name.endswith(COMPUTED)}
    embedding = next((name for name in found if name.endswith(EMBEDDINGS)), None)
    if embedding is not None and not any(name.endswith(HEAD) for name in found):
        found[HEAD] = found[embedding]
    return found


def _header(file: Path) -> Shapes:
    """Eight bytes of length, little-endian, then as many of JSON: https://github.com/huggingface/safetensors#format."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > LONGEST:
            raise ValueError(f"'{file}' begins with no header of safetensors")
        entries = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
