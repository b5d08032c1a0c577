"""Files of at most a given size, their index, and what lies beside them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loomtune.catalogue import installed
from loomtune.contracts import Trained
from loomtune.errors import UserError
from loomtune.testing.toy import ToyAdapter, ToyModel

TENSOR = 4 * 1000


def exporter(tensors: float) -> Any:
    """One whose files hold that many tensors of a thousand numbers."""
    return installed().build("exporter", "huggingface", {"shard_gigabytes": tensors * TENSOR / 1e9})


class Leaving(Trained):
    """A model that has these tensors once it is merged. stored: types in its base's files."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], stored: dict[str, torch.dtype] | None = None) -> None:
        absent: Any = None
        nothing: frozenset[str] = frozenset()
        super().__init__(
            model=ToyModel(), adapter=ToyAdapter(), chosen={"name": "toy"}, weights=absent, source=absent,
            learned=nothing, kept=nothing, fetch=absent,
        )  # fmt: skip
        object.__setattr__(self, "_leaving", (iter(tensors), stored or {}))

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        return self._leaving[0]  # type: ignore[attr-defined, no-any-return]

    def stored(self, name: str) -> torch.dtype | None:
        return self._leaving[1].get(name)  # type: ignore[attr-defined, no-any-return]


def thousands(count: int) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"layer.{number}", torch.full((1000,), float(number))) for number in range(count))


def test_what_fits_into_one_file_has_no_index(tmp_path: Path) -> None:
    exporter(3).export(Leaving(thousands(3)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "toy"}
    assert load_file(tmp_path / "model.safetensors").keys() == {"layer.0", "layer.1", "layer.2"}


def test_what_does_not_is_found_by_the_index(tmp_path: Path) -> None:
    exporter(2.5).export(Leaving(thousands(5)), tmp_path)
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
    exporter(2).export(Leaving(iter([*thousands(1), large, ("last", torch.ones(10))])), tmp_path)
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

    exporter(3).export(Leaving(watched()), tmp_path)
    assert most <= 4, "a file's tensors and the next one"


def test_scalar_heads_lie_beside_the_model(tmp_path: Path) -> None:
    head = ("heads.reward.weight", torch.ones(1, 16))
    exporter(9).export(Leaving(iter([head, *thousands(1)])), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"layer.0"}
    assert torch.equal(load_file(tmp_path / "heads.safetensors")["heads.reward.weight"], torch.ones(1, 16))


def test_files_of_no_size_are_refused() -> None:
    with pytest.raises(UserError, match="shard_gigabytes"):
        exporter(0)


def test_each_tensor_leaves_in_the_type_of_its_file_and_heads_in_fp32(tmp_path: Path) -> None:
    stored = {"layer.0": torch.bfloat16, "layer.1": torch.float32, "count": torch.int64, "heads.reward.weight": None}
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    tensors = {"layer.0": numbers, "layer.1": numbers, "layer.new": numbers + 1, "count": torch.tensor([7])}
    exporter(9).export(Leaving([*tensors.items(), ("heads.reward.weight", torch.ones(1, 16))], stored), tmp_path)
    left = load_file(tmp_path / "model.safetensors")
    assert torch.equal(left["layer.0"], numbers.bfloat16()) and left["layer.0"].dtype == torch.bfloat16
    assert torch.equal(left["layer.1"], numbers) and torch.equal(left["layer.new"], numbers + 1)
    assert left["count"].dtype == torch.int64
    assert load_file(tmp_path / "heads.safetensors")["heads.reward.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32", "the type of most bytes"


@pytest.mark.parametrize(("asked", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_another_type_can_be_asked_for(asked: str, name: str, tmp_path: Path) -> None:
    stored = {"layer.0": torch.bfloat16, "layer.1": torch.float32}
    chosen = installed().build("exporter", "huggingface", {"dtype": asked})
    chosen.export(Leaving(thousands(2), stored), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {getattr(torch, name)}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == name


def test_files_are_as_large_as_what_is_written(tmp_path: Path) -> None:
    exporter(1).export(Leaving(thousands(4), {f"layer.{n}": torch.bfloat16 for n in range(4)}), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * TENSOR // 2} and len(set(index["weight_map"].values())) == 2


def test_a_type_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"(?s)dtype=int8.*auto, fp32, bf16, fp16"):
        installed().build("exporter", "huggingface", {"dtype": "int8"})
