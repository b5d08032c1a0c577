"""Attention under a mask, piece by piece: the same numbers and gradients as under the whole mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loomtune.contracts import Batch
from loomtune_plugins.kernels.masks import additive
from loomtune_plugins.kernels.pieces import SHORT, InPieces
from loomtune_plugins.kernels.sdpa import SDPA
from loomtune_plugins.kernels.settings import SDPASettings
from trees import Piece, draw, lay

KERNEL = SDPA(SDPASettings())


def batch() -> Batch:
    """A pair, packed samples of which one has a parent without tokens, and a chain, in rows of unequal length."""
    pair = [Piece(draw(200)), Piece(draw(60), 0), Piece(draw(40), 0)]
    packed = [Piece([]), Piece(draw(70), 0), Piece(draw(20), 1), Piece(draw(50)), Piece(draw(9), 3), Piece(draw(30), 3)]
    return lay(pair, packed, [Piece(draw(90)), Piece(draw(33), 0)])


def attended(mask: Tensor, heads: int = 2) -> list[Tensor]:
    """What attention by a mask makes of drawn tensors, and the gradients with respect to them."""
    rows, _, length, _ = mask.shape
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(rows, heads, length, 8, generator=generator, requires_grad=True) for _ in range(3)]
    result = F.scaled_dot_product_attention(*given, attn_mask=mask, scale=0.3)
    weights = torch.randn(result.shape, generator=generator)
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), given)]


def test_pieces_attend_as_the_whole_mask_does_and_have_its_gradients() -> None:
    whole = additive(batch(), torch.float32)
    in_pieces = InPieces.of(whole, batch())
    assert isinstance(in_pieces, InPieces)
    for ours, theirs in zip(attended(in_pieces), attended(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_query_is_multiplied_only_with_keys_that_its_segment_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = InPieces.of(additive(batch(), torch.float32), batch())
    products, plain = [], F.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, *others: Tensor, **named: Tensor) -> Tensor:
        products.append(query.shape[2] * key.shape[2])
        return plain(query, key, *others, **named)

    tensors = [torch.zeros(3, 1, mask.shape[-1], 4)] * 3
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    InPieces.__torch_function__(counted, (), tensors, {"attn_mask": mask})
    padding = [121, 177]
    pair, packed = 200**2 + 60 * 260 + 40 * 240, 70**2 + 20 * 90 + 50**2 + 9 * 59 + 30 * 80
    assert sum(products) == pair + packed + 90**2 + 33 * 123 + sum(size**2 for size in padding)


def test_who_makes_another_mask_of_one_in_pieces_has_a_plain_one() -> None:
    mask = InPieces.of(additive(batch(), torch.float32), batch())
    for changed in (mask.bool(), mask[:, :, :10, :10], mask + 1, mask.masked_fill(mask < 0, -1.0)):
        assert type(changed) is Tensor


def test_short_rows_keep_their_mask_whole() -> None:
    half = SHORT // 2
    for length, kind in ((half, Tensor), (half + 1, InPieces)):
        laid = lay([Piece(draw(half)), Piece(draw(length))])
        assert type(KERNEL.attention(laid, torch.float32)["attention_mask"]) is kind


def test_on_other_devices_than_a_cpu_a_mask_stays_as_it_is() -> None:
    mask = additive(batch(), torch.float32).to("meta")
    assert InPieces.of(mask, batch()) is mask
