"""Generation in the training process: exact, independent of batching, and without a trace."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loomtune.contracts import Completion, Role, Sampling
from loomtune.errors import UserError
from loomtune.world import World
from loomtune_plugins.rollouts import generation
from loomtune_plugins.rollouts.huggingface import HuggingFace
from loomtune_plugins.rollouts.settings import HuggingFaceSettings

VOCABULARY = 13
STOP = 8


class Engine:
    """What generation asks of an engine; counts that every entered context was left."""

    def __init__(self, module: LlamaForCausalLM) -> None:
        self.module, self.inside, self.entered = module, 0, []

    @contextmanager
    def _within(self, name: str) -> Iterator[LlamaForCausalLM]:
        self.entered.append(name)
        self.inside += 1
        yield self.module
        self.inside -= 1

    def evaluating(self):
        return self._within("evaluating")

    def gathered(self):
        return self._within("gathered")


@pytest.fixture(scope="module")
def module() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=STOP,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(8)
    made.generation_config.repetition_penalty = 5.0
    made.generation_config.forced_eos_token_id = 5
    return made.train()


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, 0, torch.device("cpu"), replica=rank, replicas=size)


def completed(
    module: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    batch: int = 64,
    where: World | None = None,
    keys: Sequence[int] = (),
    **sampling: Any,
) -> list[Completion]:
    role = Role("policy", Engine(module))  # type: ignore[arg-type]
    wanted = Sampling(**{"max_tokens": 8, "stop": (STOP,)} | sampling)
    keys = keys or range(len(prompts))
    return HuggingFace(HuggingFaceSettings(batch=batch)).generate(role, prompts, keys, wanted, where or world())


def generate(*asked: Any, **how: Any) -> list[list[int]]:
    return [list(one.tokens) for one in completed(*asked, **how)]


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def greedily(module: LlamaForCausalLM, prompt: Sequence[int], count: int = 8) -> list[int]:
    """Without padding, cache or transformers' generate."""
    made: list[int] = []
    with torch.no_grad():
        while len(made) < count and (not made or made[-1] != STOP):
            scores = module(input_ids=torch.tensor([[*prompt, *made]]), use_cache=False).logits[0, -1]
            made.append(int(scores.argmax()))
    return made


def test_greedy_completions_are_those_of_a_plain_loop_over_single_prompts(module) -> None:
    asked = prompts(12)
    expected = [greedily(module, prompt) for prompt in asked]
    assert any(tokens[-1] == STOP and len(tokens) < 8 for tokens in expected)
    assert any(len(tokens) == 8 for tokens in expected)
    assert generate(module, asked) == expected


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_size_changes_no_completion(module, batch: int, temperature: float) -> None:
    asked = prompts(12)
    expected = generate(module, asked, temperature=temperature)
    assert generate(module, asked, batch=batch, temperature=temperature) == expected


def test_sampled_completions_are_the_same_on_one_process_and_on_two(module) -> None:
    asked = prompts(7)
    together: list[list[int]] = generate(module, asked, temperature=1.0)
    for rank in (0, 1):
        own = generate(module, asked[rank::2], where=world(rank, 2), keys=range(7)[rank::2], temperature=1.0)
        assert own == together[rank::2]


def test_equal_prompts_with_other_keys_get_other_completions_and_with_the_same_the_same(module) -> None:
    first = generate(module, [[3, 4]] * 8, temperature=3.0)
    second = generate(module, [[3, 4]] * 8, keys=[7, 6, 5, 4, 3, 2, 1, 0], temperature=3.0)
    assert len({tuple(tokens) for tokens in first}) > 4
    assert first == second[::-1]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_completion_says_the_log_probability_of_each_token_at_that_temperature(
    module, temperature: float, top_k: int
) -> None:
    asked = prompts(12)
    found = completed(module, asked, temperature=temperature, top_k=top_k, max_tokens=12)
    assert len({len(one.tokens) for one in found}) > 1
    for prompt, one in zip(asked, found, strict=True):
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([[*prompt, *one.tokens]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / (temperature or 1.0)).log_softmax(-1)[range(len(one.tokens)), list(one.tokens)]
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-5, rtol=1e-5)


def test_rows_that_have_ended_leave_the_batch(module, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    handle = module.register_forward_pre_hook(
        lambda _, given, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    asked = prompts(32)
    found = generate(module, asked, temperature=2.0, max_tokens=60)
    handle.remove()
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 8
    assert sum(sizes) < 0.6 * 32 * max(map(len, found))
    monkeypatch.setattr(generation, "LEAVING", 1.0)
    assert generate(module, asked, temperature=2.0, max_tokens=60) == found


def test_samples_have_the_probabilities_of_the_model_at_that_temperature(module) -> None:
    drawn = Counter(
        tokens[0] for tokens in generate(module, [[3, 4]] * 4000, batch=4000, temperature=2.0, max_tokens=1)
    )
    with torch.no_grad():
        expected = (module(input_ids=torch.tensor([[3, 4]])).logits[0, -1] / 2.0).softmax(-1)
    found = torch.tensor([drawn[token] / 4000 for token in range(VOCABULARY)])
    assert 0.05 < expected.max() < 0.95
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_written_past_the_last_position_that_a_model_has(temperature: float) -> None:
    torch.manual_seed(1)
    shape = {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": STOP}
    places = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape)).eval()
    asked = [[3] * length for length in (2, 11, 9, 12, 5, 11, 13, 4, 3)]
    found = generate(places, asked, temperature=temperature, max_length=12, stop=())
    assert [len(tokens) for tokens in found] == [8, 1, 3, 0, 7, 1, 0, 8, 8]
    alone = []
    for number, prompt in enumerate(asked):
        alone += generate(places, [prompt], keys=[number], temperature=temperature, max_length=12, stop=())
    assert found == alone


def test_top_k_and_top_p_cut_what_may_be_drawn(module) -> None:
    best = [greedily(module, [3, 4], 1)] * 50
    assert generate(module, [[3, 4]] * 50, temperature=5.0, top_k=1, max_tokens=1) == best
    assert generate(module, [[3, 4]] * 50, temperature=5.0, top_p=1e-6, max_tokens=1) == best
    assert generate(module, [[3, 4]] * 50, temperature=5.0, max_tokens=1) != best


def test_generation_neither_hangs_on_the_global_state_nor_changes_it(module) -> None:
    before = torch.get_rng_state()
    drawn = generate(module, prompts(2), temperature=1.0)
    torch.manual_seed(8)
    assert generate(module, prompts(2), temperature=1.0) == drawn
    torch.set_rng_state(before)
    generate(module, prompts(2), temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rank_without_prompts_takes_part(module) -> None:
    engine = Engine(module)
    role = Role("policy", engine)  # type: ignore[arg-type]
    assert HuggingFace(HuggingFaceSettings()).generate(role, [], [], Sampling(max_tokens=4), world()) == []
    assert set(engine.entered) == {"evaluating", "gathered"} and engine.inside == 0


def test_nothing_is_left_changed(module) -> None:
    settings, flags = module.generation_config, [part.training for part in module.modules()]
    generate(module, prompts(3))
    assert module.generation_config is settings and settings.repetition_penalty == 5.0
    assert [part.training for part in module.modules()] == flags and all(flags)
    assert module.config.use_cache is True
    assert all(weight.grad is None and weight.requires_grad for weight in module.parameters())


def test_the_models_generation_settings_come_back_after_an_error(module) -> None:
    settings = module.generation_config
    with pytest.raises(Exception):  # noqa: B017 - which one is transformers' affair
        generate(module, [[VOCABULARY + 5]])
    assert module.generation_config is settings


def test_a_role_with_its_adapter_off_is_not_generated_from(module) -> None:
    role = SimpleNamespace(adapter=False, engine=Engine(module))
    with pytest.raises(AssertionError, match="adapter"):
        HuggingFace(HuggingFaceSettings()).generate(role, [[3]], [0], Sampling(max_tokens=1), world())  # type: ignore[arg-type]


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.batch"):
        HuggingFace(HuggingFaceSettings(batch=0))
