"""Generation in the training process: exact, independent of batching, and without a trace."""

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from generating import STOP, VOCABULARY, Engine, completed, generate, prompts, world
from loomtune.catalogue import installed
from loomtune.contracts import Role, Rollout, Sampling
from loomtune.errors import UserError

pytestmark = pytest.mark.parametrize("name", ["huggingface", "continuous"])


def engine(name: str, **settings: Any) -> Rollout:
    return installed().build("rollout", name, settings)  # type: ignore[no-any-return]


def greedily(module: LlamaForCausalLM, prompt: Sequence[int], count: int = 8) -> list[int]:
    """Without padding, cache or transformers' generate."""
    made: list[int] = []
    with torch.no_grad():
        while len(made) < count and (not made or made[-1] != STOP):
            scores = module(input_ids=torch.tensor([[*prompt, *made]]), use_cache=False).logits[0, -1]
            made.append(int(scores.argmax()))
    return made


def test_greedy_completions_are_those_of_a_plain_loop_over_single_prompts(name, module) -> None:
    asked = prompts(12)
    expected = [greedily(module, prompt) for prompt in asked]
    assert any(tokens[-1] == STOP and len(tokens) < 8 for tokens in expected)
    assert any(len(tokens) == 8 for tokens in expected)
    assert generate(name, module, asked) == expected


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_size_changes_no_completion_and_the_engine_neither(
    name, module, batch: int, temperature: float
) -> None:
    asked = prompts(12)
    expected = generate("huggingface", module, asked, temperature=temperature)
    assert generate(name, module, asked, settings={"batch": batch}, temperature=temperature) == expected


def test_sampled_completions_are_the_same_on_one_process_and_on_two(name, module) -> None:
    asked = prompts(7)
    together: list[list[int]] = generate(name, module, asked, temperature=1.0)
    for rank in (0, 1):
        own = generate(name, module, asked[rank::2], where=world(rank, 2), keys=range(7)[rank::2], temperature=1.0)
        assert own == together[rank::2]


def test_equal_prompts_with_other_keys_get_other_completions_and_with_the_same_the_same(name, module) -> None:
    first = generate(name, module, [[3, 4]] * 8, temperature=3.0)
    second = generate(name, module, [[3, 4]] * 8, keys=[7, 6, 5, 4, 3, 2, 1, 0], temperature=3.0)
    assert len({tuple(tokens) for tokens in first}) > 4
    assert first == second[::-1]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_completion_says_the_log_probability_of_each_token_at_that_temperature(
    name, module, temperature: float, top_k: int
) -> None:
    asked = prompts(12)
    found = completed(name, module, asked, temperature=temperature, top_k=top_k, max_tokens=12)
    assert len({len(one.tokens) for one in found}) > 1
    for prompt, one in zip(asked, found, strict=True):
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([[*prompt, *one.tokens]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / (temperature or 1.0)).log_softmax(-1)[range(len(one.tokens)), list(one.tokens)]
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=5e-5, rtol=5e-5)


def test_samples_have_the_probabilities_of_the_model_at_that_temperature(name, module) -> None:
    count = {"huggingface": 4000, "continuous": 1000}[name]
    settings = {"huggingface": {"batch": 4000}, "continuous": {"batch": 250}}[name]
    asked = [[3, 4]] * count
    drawn = Counter(
        tokens[0] for tokens in generate(name, module, asked, settings=settings, temperature=2.0, max_tokens=1)
    )
    with torch.no_grad():
        expected = (module(input_ids=torch.tensor([[3, 4]])).logits[0, -1] / 2.0).softmax(-1)
    found = torch.tensor([drawn[token] / count for token in range(VOCABULARY)])
    assert 0.05 < expected.max() < 0.95
    torch.testing.assert_close(found, expected, atol=0.03 * (4000 / count) ** 0.5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_written_past_the_last_position_that_a_model_has(name, temperature: float) -> None:
    torch.manual_seed(1)
    shape = {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": STOP}
    places = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape)).eval()
    asked = [[3] * length for length in (2, 11, 9, 12, 5, 11, 13, 4, 3)]
    how = {"temperature": temperature, "max_length": 12, "stop": ()}
    found = generate(name, places, asked, **how)
    assert [len(tokens) for tokens in found] == [8, 1, 3, 0, 7, 1, 0, 8, 8]
    alone = [generate("huggingface", places, [prompt], keys=[i], **how)[0] for i, prompt in enumerate(asked)]
    assert found == alone


def test_top_k_and_top_p_cut_what_may_be_drawn(name, module) -> None:
    best = [greedily(module, [3, 4], 1)] * 50
    assert generate(name, module, [[3, 4]] * 50, temperature=5.0, top_k=1, max_tokens=1) == best
    assert generate(name, module, [[3, 4]] * 50, temperature=5.0, top_p=1e-6, max_tokens=1) == best
    assert generate(name, module, [[3, 4]] * 50, temperature=5.0, max_tokens=1) != best


def test_generation_neither_hangs_on_the_global_state_nor_changes_it(name, module) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    drawn = generate(name, module, prompts(2), temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert generate(name, module, prompts(2), temperature=1.0) == drawn


def test_a_rank_without_prompts_takes_part(name, module) -> None:
    own = Engine(module)
    role = Role("policy", own)  # type: ignore[arg-type]
    assert engine(name).generate(role, [], [], Sampling(max_tokens=4), world()) == []
    assert set(own.entered) == {"evaluating", "gathered"} and own.inside == 0


def test_nothing_is_left_changed(name, module) -> None:
    settings, flags = module.generation_config, [part.training for part in module.modules()]
    generate(name, module, prompts(3))
    assert module.generation_config is settings and settings.repetition_penalty == 5.0
    assert [part.training for part in module.modules()] == flags and all(flags)
    assert module.config.use_cache is True and module.config._attn_implementation == "sdpa"
    assert all(weight.grad is None and weight.requires_grad for weight in module.parameters())


def test_the_models_settings_come_back_after_an_error(name, module) -> None:
    settings = module.generation_config
    with pytest.raises(Exception):  # noqa: B017 - which one is transformers' affair
        generate(name, module, [[VOCABULARY + 5]])
    assert module.generation_config is settings and module.training


def test_a_role_with_its_adapter_off_is_not_generated_from(name, module) -> None:
    role = SimpleNamespace(adapter=False, engine=Engine(module))
    with pytest.raises(AssertionError, match="adapter"):
        engine(name).generate(role, [[3]], [0], Sampling(max_tokens=1), world())  # type: ignore[arg-type]


def test_a_batch_of_nothing_is_refused(name) -> None:
    with pytest.raises(UserError, match=r"rollout\.batch"):
        engine(name, batch=0)
