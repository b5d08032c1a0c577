"""Files of at most a given size, their index, and what lies beside them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.testing.toy import ToyModel

TENSOR = 4 * 1000


def exporter(tensors: float) -> Any:
    """One whose files hold that many tensors of a thousand numbers."""
    return installed().build("exporter", "huggingface", {"shard_gigabytes": tensors * TENSOR / 1e9})


def thousands(count: int) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"layer.{number}", torch.full((1000,), float(number))) for number in range(count))


def test_what_fits_into_one_file_has_no_index(tmp_path: Path) -> None:
    exporter(3).export(ToyModel(), thousands(3), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "toy"}
    assert load_file(tmp_path / "model.safetensors").keys() == {"layer.0", "layer.1", "layer.2"}


def test_what_does_not_is_found_by_the_index(tmp_path: Path) -> None:
    exporter(2.5).export(ToyModel(), thousands(5), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * TENSOR}
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == files
    for number, (name, file) in enumerate(sorted(index["weight_map"].items())):
        assert torch.equal(load_file(tmp_path / file)[name], torch.full((1000,), float(number)))
    assert not list(tmp_path.glob("*.part"))


def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    large = ("large", torch.ones(5000))
    exporter(2).export(ToyModel(), iter([*thousands(1), large, ("last", torch.ones(10))]), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 3 and index["large"] not in (index["layer.0"], index["last"])


def test_no_more_than_one_file_is_held_in_memory(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def watched() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, tensor in thousands(12):
            alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    exporter(3).export(ToyModel(), watched(), tmp_path)
    assert most <= 4, "a file's tensors and the next one"


def test_scalar_heads_lie_beside_the_model(tmp_path: Path) -> None:
    head = ("heads.reward.weight", torch.ones(1, 16))
    exporter(9).export(ToyModel(), iter([head, *thousands(1)]), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"layer.0"}
    assert torch.equal(load_file(tmp_path / "heads.safetensors")["heads.reward.weight"], torch.ones(1, 16))


def test_files_of_no_size_are_refused() -> None:
    with pytest.raises(UserError, match="shard_gigabytes"):
        exporter(0)
