"""Dropout masks belong to seed, layer, sample, segment, position and channel, and to nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loomtune.contracts import Batch
from loomtune.errors import UserError
from loomtune.toolkit.dropout import SeededDropout, batch_keys, dropout_keys, recompute_keys, replace_dropout
from loomtune.world import derive

Laid = Sequence[Sequence[tuple[int, int, int]]]
"""Rows of segments: (sample number, length, first position). Segments are numbered in the order of appearance."""


def lay(rows: Laid, width: int = 0) -> Batch:
    """A batch with what dropout reads of one, padded to the longest row or to a width."""
    numbers = list(dict.fromkeys(number for row in rows for number, _, _ in row))
    width = max([width, *(sum(length for _, length, _ in row) for row in rows)])
    segments, positions = (torch.full((len(rows), width), fill) for fill in (-1, 0))
    owners: list[int] = []
    for r, row in enumerate(rows):
        at = 0
        for number, length, start in row:
            segments[r, at : at + length] = len(owners)
            positions[r, at : at + length] = torch.arange(start, start + length)
            owners.append(numbers.index(number))
            at += length
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(
        tokens=torch.zeros_like(segments), positions=positions, segments=segments,
        parents=torch.full((len(owners),), -1),
        sample_of_segment=torch.tensor(owners, dtype=torch.int64),
        part=torch.tensor([owners[:i].count(owner) for i, owner in enumerate(owners)], dtype=torch.int64),
        predict_from=nothing, target=nothing, row=nothing,
        sample_numbers=torch.tensor(numbers, dtype=torch.int64),
    )  # fmt: skip


def mask(batch: Batch, channels: int = 512, p: float = 0.5, seed: int = 3, name: str = "layer") -> Tensor:
    with dropout_keys(batch):
        return SeededDropout(p, seed, name).mask(torch.ones(*batch.segments.shape, channels))


def whole(*numbers: int, length: int = 64) -> Batch:
    return lay([[(number, length, 0)] for number in numbers])


def test_masks_do_not_change_with_order_micro_batch_padding_or_packing() -> None:
    together = mask(lay([[(11, 5, 0)], [(4, 9, 0)], [(7, 3, 0)]]))
    reordered = mask(lay([[(7, 3, 0)], [(11, 5, 0)], [(4, 9, 0)]], width=20))
    packed = mask(lay([[(4, 9, 0), (11, 5, 0)], [(7, 3, 0)]]))
    alone = mask(lay([[(11, 5, 0)]]))
    assert torch.equal(together[0, :5], reordered[1, :5])
    assert torch.equal(together[1, :9], reordered[2, :9])
    assert torch.equal(together[2, :3], reordered[0, :3])
    assert torch.equal(together[0, :5], packed[0, 9:14])
    assert torch.equal(together[1, :9], packed[0, :9])
    assert torch.equal(together[0, :5], alone[0])


def test_two_answers_of_a_sample_differ_and_keep_their_masks_in_any_company() -> None:
    pair = [(5, 4, 0), (5, 6, 4), (5, 6, 4)]
    first = mask(lay([pair, [(2, 3, 0)]]))[0]
    later = mask(lay([[(2, 3, 0), *pair]]))[0, 3:]
    assert torch.equal(first, later)
    assert not torch.equal(first[4:10], first[10:16])


def test_segments_are_counted_within_their_sample_also_where_samples_interleave() -> None:
    apart = batch_keys(lay([[(1, 3, 0), (1, 3, 0)], [(2, 3, 0), (2, 3, 0)]]))
    mixed = batch_keys(lay([[(1, 3, 0), (2, 3, 0)], [(1, 3, 0), (2, 3, 0)]]))
    assert torch.equal(mixed[:, :3], apart[0].view(2, 3))
    assert torch.equal(mixed[:, 3:], apart[1].view(2, 3))


def test_a_batch_of_padding_or_of_nothing_has_keys() -> None:
    assert batch_keys(lay([[]], width=4)).shape == (1, 4)
    empty = lay([], width=4)
    with dropout_keys(empty):
        assert SeededDropout(0.1, 0, "a")(torch.ones(0, 4, 8)).shape == (0, 4, 8)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_of_kept_entries_is_as_asked(p: float) -> None:
    kept = mask(whole(*range(8), length=128), p=p)
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * sigma


@pytest.mark.parametrize("dims", [(0, 1), (2,)], ids=["over positions", "over channels"])
def test_no_channel_and_no_position_is_favoured(dims: tuple[int, ...]) -> None:
    kept = mask(whole(*range(16)), p=0.1).double()
    entries = kept.numel() // kept.mean(dims).numel()
    z = (kept.mean(dims).flatten() - 0.9) / (0.09 / entries) ** 0.5
    # The mean of n squared standard normals is 1 with a deviation of sqrt(2 / n).
    assert abs(z.square().mean().item() - 1) < 4 * (2 / z.numel()) ** 0.5


def chi_square(a: Tensor, b: Tensor) -> float:
    """Of independence between two masks: about 1 on average, above 16 once in 16,000 times."""
    n, both = a.numel(), (a & b).double().sum()
    ones, twos = a.double().sum(), b.double().sum()
    return ((n * both - ones * twos) ** 2 * n / (ones * (n - ones) * twos * (n - twos))).item()


def test_neighbours_are_independent() -> None:
    kept = mask(whole(*range(16)), p=0.3)
    for step in (1, 2, 8, 64, 256):
        assert chi_square(kept[:, :, step:], kept[:, :, :-step]) < 16, f"channels {step} apart"
    for step in (1, 2, 32):
        assert chi_square(kept[:, step:], kept[:, :-step]) < 16, f"positions {step} apart"
        assert chi_square(kept[:, step:, step:], kept[:, :-step, :-step]) < 16, "along the diagonal"
    for step in (1, 8):
        assert chi_square(kept[step:], kept[:-step]) < 16, f"samples {step} apart"
    for one, other in pairwise([*range(4), 3]):
        masks = [mask(whole(*range(4)), p=0.3, seed=number, name="a") for number in (one, other)]
        assert (chi_square(*masks) < 16) == (one != other), "seeds, and a mask with itself"
    layers = [mask(whole(*range(4)), p=0.3, name=f"layers.{i}") for i in range(4)]
    for one, other in pairwise(layers):
        assert chi_square(one, other) < 16, "layers"


def plain_mix64(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def plain_kept(number: int, within: int, position: int, channel: int, p: float) -> bool:
    """The rule in unbounded integers, without torch."""
    salt = derive(3, "dropout", "layer")
    segment = plain_mix64((plain_mix64(number) + within) % 2**64)
    key = plain_mix64((segment + position * 0x9E3779B97F4A7C15) % 2**64)
    h = (plain_mix64(key ^ salt) ^ plain_mix64(channel + 1 ^ salt)) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return (h + 2**31) % 2**32 >= p * 2**32


def test_a_resumed_run_meets_its_masks_again_on_any_version_and_device() -> None:
    """The tensor arithmetic is that of unbounded integers: no shift or overflow depends on a machine."""
    kept = mask(lay([[(5, 6, 0), (5, 4, 6)]]), channels=16, p=0.25)[0].tolist()
    places = [(0, position) for position in range(6)] + [(1, position) for position in range(6, 10)]
    assert kept == [[plain_kept(5, *place, channel, 0.25) for channel in range(16)] for place in places]


def test_kept_entries_are_scaled_and_so_is_their_gradient() -> None:
    batch, layer = whole(1, 2), SeededDropout(0.2, 0, "a")
    x = torch.full((2, 64, 32), 4.0, requires_grad=True)
    with dropout_keys(batch):
        y, kept = layer(x), layer.mask(x)
    assert torch.equal(y, kept * 5.0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept * 1.25)


def test_bf16_keeps_its_type_and_its_scale() -> None:
    layer, x = SeededDropout(0.1, 0, "a"), torch.full((1, 64, 32), 3.0, dtype=torch.bfloat16)
    with dropout_keys(whole(1)):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.max() == torch.tensor(3 / 0.9, dtype=torch.bfloat16)


def test_dimensions_beyond_the_third_count_as_channels() -> None:
    layer = SeededDropout(0.5, 0, "a")
    with dropout_keys(whole(1)):
        assert torch.equal(layer.mask(torch.ones(1, 64, 4, 8)).flatten(2), layer.mask(torch.ones(1, 64, 32)))


def test_evaluation_drops_nothing_and_needs_no_keys() -> None:
    x = torch.ones(1, 2, 3)
    assert SeededDropout(0.5, 0, "a").eval()(x) is x


def test_training_without_keys_is_refused() -> None:
    with dropout_keys(whole(1)):
        pass
    with pytest.raises(AssertionError, match=r"dropout_keys\(batch\)"):
        SeededDropout(0.5, 0, "a")(torch.ones(1, 64, 3))


@pytest.mark.parametrize("shape", [(64, 3), (64, 1, 3), (1, 64), (1, 63, 3)])
def test_another_layout_is_refused_by_the_name_of_the_layer(shape: tuple[int, ...]) -> None:
    with dropout_keys(whole(1)), pytest.raises(UserError, match=r"(?s)experts\.gate.*\(rows, length\).*cure"):
        SeededDropout(0.5, 0, "experts.gate")(torch.ones(shape))


def test_every_dropout_of_a_module_is_replaced_under_its_path() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5).eval()))
    module.lora = nn.ModuleDict({"default": nn.Dropout(0.25)})
    assert replace_dropout(module, seed=3) == 3
    ours = {name: child for name, child in module.named_modules() if isinstance(child, SeededDropout)}
    assert {name: (child.name, child.p) for name, child in ours.items()} == {
        "1": ("1", 0.5), "2.1": ("2.1", 0.5), "lora.default": ("lora.default", 0.25),
    }  # fmt: skip
    assert ours["1"].training and not ours["2.1"].training
    assert type(module[2][0]) is nn.Dropout
    assert replace_dropout(module, seed=3) == 0
    with dropout_keys(whole(1)):
        assert torch.equal(ours["1"].mask(torch.ones(1, 64, 8)), mask(whole(1), channels=8, name="1"))


class Block(nn.Module):
    def __init__(self, recompute: bool, **how) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), SeededDropout(0.5, 0, "a"), nn.Tanh(), nn.Linear(8, 8))
        for number, parameter in enumerate(self.inner.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        self.recompute, self.how = recompute, how

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False, **self.how) if self.recompute else self.inner(x)


def gradients(block: Block, *batches: Batch, backward_inside: bool = False) -> list[Tensor]:
    """Gradients of the sum over batches, all forwards before the first backward."""
    x, losses = torch.linspace(-1, 1, 64 * 8).view(1, 64, 8), []
    for batch in batches:
        with dropout_keys(batch):
            losses.append(block(x).square().sum())
            if backward_inside:
                losses.pop().backward()
    for loss in losses:
        loss.backward()
    return [parameter.grad for parameter in block.parameters()]


@pytest.mark.parametrize("backward_inside", [False, True])
def test_recomputation_in_the_backward_pass_meets_the_same_mask(backward_inside: bool) -> None:
    plain = gradients(Block(False), whole(1), backward_inside=backward_inside)
    again = gradients(Block(True), whole(1), backward_inside=backward_inside)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recomputation_meets_its_own_mask_among_several_batches() -> None:
    plain = gradients(Block(False), whole(1), whole(2))
    again = gradients(Block(True, context_fn=recompute_keys), whole(1), whole(2))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(plain, again, strict=True))
    without = gradients(Block(True), whole(1), whole(2))
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(plain, without, strict=True))


def test_recomputation_leaves_the_keys_of_the_next_forward_alone() -> None:
    block, layer, x = Block(True, context_fn=recompute_keys), SeededDropout(0.5, 0, "b"), torch.ones(1, 64, 8)
    with dropout_keys(whole(1)):
        loss = block(x).sum()
    with dropout_keys(whole(2)):
        before = layer.mask(x)
        loss.backward()
        assert torch.equal(layer.mask(x), before)
        with dropout_keys(whole(3)):
            assert not torch.equal(layer.mask(x), before)
        assert torch.equal(layer.mask(x), before)
