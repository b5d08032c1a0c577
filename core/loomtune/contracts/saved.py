"""What files of a saved model are called, as Hugging Face's loaders know them, and its heads, which they do not.

Checkpoints and exporters write these names and models read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

HEADS = "heads."
"""How names of scalar heads begin, in a network and in files."""

INNER = f"{HEADS}_"
"""How names of heads begin that training alone reads, such as one that foretells rewards: they are in no export."""

HEADS_FILE = "heads.safetensors"
"""Beside the weights of a model or an adapter: Hugging Face's loaders know no scalar heads and do not open it."""

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

LONGEST = 100_000_000
"""Bytes of a header that the format of safetensors allows."""


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's tensors by name, of which no more than the header is read.

    Raises ValueError where it is none. Eight bytes of length, little-endian, then as many of JSON:
    https://github.com/huggingface/safetensors#format.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length)) if length <= LONGEST else None
        return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}  # type: ignore[union-attr]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"'{file}' begins with no header of safetensors") from error


def weight_files(count: int) -> list[str]:
    """The names of a model's files of weights, in one or more parts."""
    return [WHOLE] if count == 1 else [f"model-{part:05d}-of-{count:05d}.safetensors" for part in range(1, count + 1)]


def index_text(places: Mapping[str, str], size: int) -> str:
    """What `INDEX` says of a model in more than one part. places: file by tensor. size: bytes of all tensors."""
    return json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1)
