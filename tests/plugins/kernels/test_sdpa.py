"""The attention kernel: segments see themselves and their ancestors, and nothing else."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from loomtune.contracts import Batch
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT
from loomtune_plugins.kernels.masks import is_causal, visible
from loomtune_plugins.kernels.sdpa import SDPA
from loomtune_plugins.kernels.settings import SDPASettings
from trees import Piece, draw, lay

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KERNEL = SDPA(SDPASettings())


@pytest.fixture(scope="module", params=["llama", "qwen", "mistral"])
def model(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)),
    }[request.param]()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(2)  # sharper attention, so that a leak is seen
    return made.train()


def logits(model, batch: Batch) -> Tensor:
    attention = KERNEL.attention(batch, torch.float32)
    return model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False, **attention).logits.detach()


def alone(model, tokens: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].detach()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_packed_samples_have_the_logits_of_separate_rows(model) -> None:
    first, second, third = draw(9, 1), draw(5, 2), draw(11, 3)
    found = logits(model, lay([Piece(first), Piece(second)], [Piece(third)]))
    close(found[0, :9], alone(model, first))
    close(found[0, 9:14], alone(model, second))
    close(found[1, :11], alone(model, third))


def test_a_changed_neighbour_moves_no_logit(model) -> None:
    mine = draw(6, 1)
    before = logits(model, lay([Piece(draw(8, 2)), Piece(mine)]))[0, 8:]
    after = logits(model, lay([Piece(draw(8, 3)), Piece(mine)]))[0, 8:]
    assert torch.equal(before, after)


def test_answers_that_share_a_prompt_have_the_logits_of_separate_rows(model) -> None:
    prompt, chosen, rejected = draw(7, 1), draw(5, 2), draw(4, 3)
    found = logits(model, lay([Piece(prompt), Piece(chosen, 0), Piece(rejected, 0)], [Piece(draw(10, 4))]))
    close(found[0, :12], alone(model, prompt + chosen))
    close(found[0, 12:16], alone(model, prompt + rejected)[7:])


def test_grandchildren_see_all_their_ancestors(model) -> None:
    root, turn, reply, other = draw(4, 1), draw(3, 2), draw(5, 3), draw(2, 4)
    row = [Piece(root), Piece(turn, 0), Piece(other, 0), Piece(reply, 1)]
    close(logits(model, lay(row))[0, 9:14], alone(model, root + turn + reply)[7:])


def test_right_padded_rows_have_the_logits_of_separate_rows_without_a_mask(model, monkeypatch) -> None:
    masks = []
    plain = F.scaled_dot_product_attention

    def spy(*arguments, attn_mask=None, is_causal=False, **others):
        masks.append((attn_mask is None, is_causal))
        return plain(*arguments, attn_mask=attn_mask, is_causal=is_causal, **others)

    short, long = draw(4, 1), draw(9, 2)
    expected = alone(model, short), alone(model, long)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    found = logits(model, lay([Piece(short)], [Piece(long)]))
    assert masks and all(mask == (True, True) for mask in masks)
    close(found[0, :4], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_and_empty_rows_leave_every_gradient_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    for batch in (lay([Piece(draw(5)), Piece(draw(3))], []), lay([Piece(draw(5))], [])):
        attention = KERNEL.attention(batch, dtype)
        found = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False, **attention).logits
        assert found.isfinite().all()
        found.float().square().sum().backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_one_chain_in_a_row_is_plain_causal_attention() -> None:
    assert is_causal(lay([Piece(draw(3)), Piece(draw(2), 0)], [Piece(draw(4))], []))


@pytest.mark.parametrize(
    "row", [[Piece([1, 2]), Piece([3])], [Piece([1]), Piece([2], 0), Piece([3], 0)]], ids=["packed", "shared prefix"]
)
def test_two_chains_in_a_row_are_not(row: list[Piece]) -> None:
    assert not is_causal(lay([Piece(draw(4))], row))


def test_padding_on_the_left_is_not() -> None:
    batch = lay([Piece([1, 2, 3])])
    assert not is_causal(
        Batch(**{name: getattr(batch, name) for name in batch.__slots__} | {"segments": torch.tensor([[-1, 0, 0]])})
    )


def test_the_mask_is_the_written_out_rule() -> None:
    batch = lay(
        [Piece([1, 2]), Piece([3], 0), Piece([4, 5], 0), Piece([6])], [Piece([7]), Piece([8], 0), Piece([9, 9], 1)]
    )
    seen = visible(batch)
    for row in range(2):
        for query in range(6):
            for key in range(6):
                own, other = int(batch.segments[row, query]), int(batch.segments[row, key])
                chain = {own}
                while own != NO_SEGMENT and batch.parents[own] != NO_PARENT:
                    own = int(batch.parents[own])
                    chain.add(own)
                rule = (other in chain and other != NO_SEGMENT and key <= query) or key == query
                assert bool(seen[row, query, key]) is rule, (row, query, key)
