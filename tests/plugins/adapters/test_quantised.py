"""Packed matrices: bitsandbytes' bytes, slice by slice, and a layer that computes and differentiates as its matrix."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loomtune.contracts import WeightSource
from loomtune_plugins.adapters.lora.quantised import Packing, QuantisedLinear
from loomtune_plugins.adapters.lora.quantised_weights import QuantisedWeights

functional = pytest.importorskip("bitsandbytes.functional", reason="the extra `quantised` is not installed")

ROWS, COLUMNS = 96, 256
TYPES = (torch.float32, torch.bfloat16, torch.float16)


class InMemory(WeightSource):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.asked: list[tuple[str, int]] = []

    def shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name, where=None):
        found = self.tensors[name] if where is None else self.tensors[name][where]
        self.asked.append((name, len(found)))
        return found


def matrix(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def source(weight: Tensor, how: Packing, bias: Tensor | None = None) -> QuantisedWeights:
    base = {"a.weight": weight, "b.weight": weight + 1, "norm.weight": torch.ones(4)}
    return QuantisedWeights(InMemory(base | ({} if bias is None else {"a.bias": bias})), {"a": how, "b": how})


def layer(weight: Tensor, how: Packing, bias: Tensor | None = None) -> QuantisedLinear:
    with torch.device("meta"):
        held = None if bias is None else nn.Parameter(torch.empty(len(bias)), requires_grad=False)
        made = QuantisedLinear(how, held)
    made.to_empty(device="cpu")
    read = source(weight, how, bias)
    for name, parameter in made.named_parameters():
        parameter.data.copy_(read.read(f"a.{name}"))
    return made


@pytest.mark.parametrize(
    ("kind", "block", "double", "dtype"),
    [
        *itertools.product(("nf4", "fp4"), (64,), (True, False), TYPES),
        ("nf4", 32, True, torch.float32),
        ("nf4", 256, False, torch.bfloat16),
    ],
)
def test_bytes_and_what_they_unpack_to_are_those_of_bitsandbytes(kind, block, double, dtype) -> None:
    weight, how = matrix().to(dtype), Packing(ROWS, COLUMNS, kind, block, double)
    theirs, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=double)
    read = source(weight, how).read
    assert torch.equal(read("a.packed").flatten(), theirs.flatten())
    scales = read("a.scales") if double else read("a.scales").view(torch.float32)
    assert torch.equal(scales.flatten(), state.absmax)
    for compute in (torch.float32, torch.bfloat16):
        state.dtype = compute
        ours = how.unpack(read("a.packed"), read("a.scales"), read("a.nested") if double else None, compute)
        assert torch.equal(ours, functional.dequantize_4bit(theirs, state))
    state.dtype = torch.float32
    assert torch.equal(read("a.weight"), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("columns", [256, 100])
def test_a_slice_is_the_slice_of_the_whole(columns: int, double: bool) -> None:
    how = Packing(ROWS, columns, double=double)
    whole = source(matrix(columns=columns), how)
    for name, shape in whole.shapes().items():
        assert tuple(whole.read(name).shape) == shape
        for start, stop in ((0, 2), (2, 2), (1, shape[0])):
            where = slice(start, stop), *(slice(0, size) for size in shape[1:])
            ours = source(matrix(columns=columns), how).read(name, where)
            assert torch.equal(ours, whole.read(name)[start:stop]), name


def test_rows_are_read_as_far_as_they_are_packed_and_a_matrix_whole_once_for_its_scales() -> None:
    base = InMemory({"a.weight": matrix()})
    read = QuantisedWeights(base, {"a": Packing(ROWS, COLUMNS)}).read
    read("a.packed", (slice(8, 24), slice(0, 128)))
    assert base.asked == [("a.weight", 16)]
    read("a.scales", (slice(8, 24),))
    read("a.nested", (slice(0, 1),))
    assert base.asked == [("a.weight", 16), ("a.weight", ROWS)]


def test_rows_that_are_no_whole_blocks_are_filled_with_zeros() -> None:
    weight, how = matrix(columns=100), Packing(ROWS, 100, double=False)
    filled = F.pad(weight, (0, 28))
    theirs, state = functional.quantize_4bit(filled, blocksize=64, quant_type="nf4")
    assert torch.equal(source(weight, how).read("a.packed").flatten(), theirs.flatten())
    assert torch.equal(source(weight, how).read("a.weight"), functional.dequantize_4bit(theirs, state)[:, :100])
    error = (source(weight, how).read("a.weight") - weight).abs()
    assert error.max() < 0.153 * weight.abs().max()  # half of nf4's widest gap, from -1 to -0.696


def test_large_matrices_are_packed_in_parts_to_the_same_bytes(monkeypatch) -> None:
    whole = Packing(ROWS, COLUMNS).pack(matrix())
    monkeypatch.setattr("loomtune_plugins.adapters.lora.quantised.AT_ONCE", 5 * COLUMNS)
    assert torch.equal(Packing(ROWS, COLUMNS).pack(matrix()), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [256, 100])
def test_a_layer_computes_and_differentiates_as_its_matrix(columns: int, dtype: torch.dtype) -> None:
    bias = torch.randn(ROWS)
    ours = layer(matrix(columns=columns), Packing(ROWS, columns), bias)
    input = torch.randn(2, 5, columns).to(dtype)
    results = []
    for compute in (ours, lambda x: F.linear(x, ours.weight.to(dtype), bias.to(dtype))):
        mine = input.clone().requires_grad_(True)
        result = compute(mine)
        result.square().sum().backward()
        assert mine.grad is not None and result.dtype == dtype
        results.append((result.detach(), mine.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_training_and_evaluating_are_the_same() -> None:
    ours, input = layer(matrix(), Packing(ROWS, COLUMNS)), torch.randn(3, COLUMNS)
    trained = ours.train()(input)
    with torch.no_grad():
        assert torch.equal(ours.eval()(input), trained)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(input), ours(input.bfloat16()))
        assert ours(input).dtype == torch.bfloat16


def test_a_layer_computes_as_bitsandbytes_own_does_in_training() -> None:
    from bitsandbytes.nn import Linear4bit

    weight, input = matrix(), torch.randn(4, COLUMNS)
    theirs = Linear4bit(COLUMNS, ROWS, bias=False, quant_type="nf4")
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu").train()
    ours, gradients, results = layer(weight, Packing(ROWS, COLUMNS)), [], []
    for one in (ours, theirs):
        mine = input.clone().requires_grad_(True)
        results.append(one(mine))
        results[-1].square().sum().backward()
        gradients.append(mine.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-4)


def test_nothing_of_the_matrix_is_kept_for_the_backward_pass() -> None:
    ours, kept = layer(matrix(), Packing(ROWS, COLUMNS)), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(torch.randn(1, COLUMNS, requires_grad=True))
    assert sum(tensor.nbytes for tensor in kept) == sum(parameter.nbytes for parameter in ours.parameters())
    assert all(tensor.dtype == torch.uint8 for tensor in kept)


@pytest.mark.parametrize(("double", "most"), [(True, 0.517), (False, 0.563)])
def test_a_layer_takes_little_more_than_half_a_byte_a_weight(double: bool, most: float) -> None:
    ours = layer(matrix(512, 1024), Packing(512, 1024, double=double))
    assert 0.5 < sum(parameter.nbytes for parameter in ours.parameters()) / (512 * 1024) < most
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.uint8}


def test_bytes_that_lie_anywhere_in_a_buffer_are_read_as_the_same_numbers() -> None:
    how, read = Packing(ROWS, COLUMNS), source(matrix(), Packing(ROWS, COLUMNS)).read
    nested = read("a.nested")
    buffer = torch.empty(nested.numel() + 3, dtype=torch.uint8)
    moved = buffer[3:].view(nested.shape).copy_(nested)
    assert torch.equal(how.unpack(read("a.packed"), read("a.scales"), moved, torch.float32), read("a.weight"))
