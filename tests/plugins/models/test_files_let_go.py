"""A file of weights is mapped into memory while a tensor is read from it, and no longer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loomtune_plugins.models.pieces import OpenFile, Stored

MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.is_file(), reason="only Linux says what a process has mapped")
@pytest.mark.parametrize("rows", [slice(0, 64, 1), slice(3, 9, 1)])
def test_what_was_read_stays_and_the_file_goes(tmp_path: Path, rows: slice) -> None:
    path = tmp_path / "weights.safetensors"
    whole = torch.arange(64.0 * 32).reshape(64, 32)
    save_file({"weight": whole}, path)
    piece = Stored(OpenFile(path), "weight")
    for _ in range(2):  # the second time it is opened again
        read = piece.read((rows, slice(0, 32, 1))).clone()
        assert torch.equal(read, whole[rows])
        assert str(path) not in MAPS.read_text()
