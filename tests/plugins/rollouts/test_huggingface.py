"""What generation by transformers' own loop saves: rows that have ended, and prompts that several rows share."""

from typing import Any

import pytest
import torch

from generating import VOCABULARY, completed, generate, prompts
from loomtune_plugins.rollouts import generation


@pytest.fixture
def sizes(module: Any) -> Any:
    """`(rows, tokens)` of each call of the module."""
    found: list[tuple[int, ...]] = []
    handle = module.register_forward_pre_hook(
        lambda _, given, named: found.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    yield found
    handle.remove()


def test_rows_that_have_ended_leave_the_batch(module, sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(32)
    found = completed("huggingface", module, asked, temperature=2.0, max_tokens=60)
    rows = [size[0] for size in sizes]
    assert rows == sorted(rows, reverse=True) and rows[-1] < 8
    assert sum(rows) < 0.6 * 32 * max(len(one.tokens) for one in found)
    monkeypatch.setattr(generation, "LEAVING", 1.0)
    whole = completed("huggingface", module, asked, temperature=2.0, max_tokens=60)
    assert [one.tokens for one in whole] == [one.tokens for one in found]
    for one, other in zip(whole, found, strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-5, rtol=1e-5)


def test_what_a_model_carries_along_as_one_state_stays_together(module, sizes, monkeypatch) -> None:
    asked = [*prompts(5), *[[3, 4, 5]] * 3]
    expected = generate("huggingface", module, asked, temperature=2.0, max_tokens=30)
    sizes.clear()
    monkeypatch.setattr(type(module), "_is_stateful", True)
    assert generate("huggingface", module, asked, temperature=2.0, max_tokens=30) == expected
    assert {size[0] for size in sizes} == {8}


def test_a_prompt_of_several_rows_is_read_once(module, sizes) -> None:
    short, long = [3, 4, 5], [*range(3, VOCABULARY)] * 3
    found = completed("huggingface", module, [short, long] * 6, temperature=2.0)
    assert sizes[0] == (2, len(long) - 1) and sizes[1] == (12, 1)
    for number, (prompt, one) in enumerate(zip([short, long] * 6, found, strict=True)):
        (alone,) = completed("huggingface", module, [prompt], keys=[number], temperature=2.0)
        assert one.tokens == alone.tokens
        torch.testing.assert_close(one.log_probs, alone.log_probs, atol=1e-5, rtol=1e-5)


def test_a_prompt_of_one_token_is_no_reason_to_fail(module) -> None:
    asked = [[3], [3], [4, 5], [4, 5]]
    alone = [generate("huggingface", module, [prompt], keys=[i], temperature=2.0)[0] for i, prompt in enumerate(asked)]
    assert generate("huggingface", module, asked, temperature=2.0) == alone
