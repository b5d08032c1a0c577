"""Writing files so that they are on the disk, whole and known by digest, before anything refers to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

CHUNK = 16 << 20  # bytes hashed and written at a time: few enough to stay in the cache between the two

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the safetensors format calls torch's types."""


class Written(NamedTuple):
    """A file as it was meant to be: its size in bytes and its sha256."""

    bytes: int
    sha256: str


def digest(path: Path, *, sync: bool = False) -> Written:
    """Size and sha256 of a file as it is now. sync: also see that it is on the disk."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return Written(file.tell(), sha256)


def write_bytes(path: Path, *blocks: bytes | memoryview) -> Written:
    """Writes a file through to the disk; the digest is of what was meant, not of what was read back."""
    sha256 = hashlib.sha256()
    with path.open("xb") as file:
        for block in blocks:
            for begin in range(0, len(block), CHUNK):
                chunk = block[begin : begin + CHUNK]
                sha256.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return Written(file.tell(), sha256.hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Writes contiguous CPU tensors in the safetensors format (https://github.com/huggingface/safetensors#format).

    Unlike the library's writer it hashes while it writes and holds Python's lock for neither, so that training goes on.
    """
    # Wide types first, as the library does: each tensor then begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = (tensor.reshape(-1).view(torch.uint8).numpy().data for _, tensor in ordered)
    return write_bytes(path, len(text).to_bytes(8, "little"), text, *data)


def replace_text(path: Path, text: str) -> None:
    """Sets a small file's content so that a reader, or a kill, meets either the old or the new."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, *blocks: bytes) -> None:
    """The same of bytes, one block after the other."""
    draft = path.with_name(f".{path.name}-{uuid4().hex[:8]}")
    write_bytes(draft, *blocks)
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sees that the names in a folder are on the disk; file systems that cannot be asked do it by themselves."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
