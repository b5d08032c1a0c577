"""Prompt tuning, P-tuning and prefix tuning: the same numbers as peft's own, and a model that is left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from adapter_fakes import InMemory
from loomtune.batching import collate
from loomtune.contracts import Sample, Segment
from loomtune.errors import UserError
from loomtune.offers import Trait
from loomtune.toolkit.dropout import batch_keys
from loomtune_plugins.adapters import adapters
from loomtune_plugins.adapters.virtual.prefix import Prefix
from loomtune_plugins.adapters.virtual.prompt import Prompt
from loomtune_plugins.adapters.virtual.ptuning import Ptuning
from loomtune_plugins.adapters.virtual.settings import PrefixSettings, PromptSettings, PtuningSettings
from loomtune_plugins.kernels.sdpa import SDPA
from loomtune_plugins.kernels.settings import SDPASettings
from support import shared

METHODS = {
    "prompt": lambda: Prompt(PromptSettings(length=4)),
    "ptuning": lambda: Ptuning(PtuningSettings(length=4, width=12)),
    "prefix": lambda: Prefix(PrefixSettings(length=4)),
    "projected prefix": lambda: Prefix(PrefixSettings(length=4, projection=True, width=6)),
}


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def adapter(request) -> Any:
    return request.param()


def segment(*tokens: int, parent: int = -1, first: int = 1) -> Segment:
    return Segment(np.array(tokens, np.int32), np.arange(len(tokens)) >= first, parent)


SAMPLES = [Sample((segment(5, 9, 3, 40, 7, 8),)), Sample((segment(11, 2, 30),)), Sample((segment(1, 6, 6, 22),))]


def batch_of(samples, rows=None):
    return collate(samples, range(len(samples)), 0, SAMPLES[0], rows)


def states(adapter, module, batch) -> Tensor:
    """Hidden states where targets are predicted, as a network computes them."""
    kernel = SDPA(SDPASettings())
    given, attention = adapter.inputs(module, batch, lambda one: kernel.attention(one, torch.float32))
    decoder = adapter.base(module).get_decoder()
    hidden = decoder(input_ids=given.tokens, position_ids=given.positions, use_cache=False, **attention)
    return hidden.last_hidden_state.flatten(0, 1)[given.predict_from]


def losses(adapter, module, batch) -> Tensor:
    """Of each target."""
    logits = adapter.base(module).lm_head(states(adapter, module, batch))
    return F.cross_entropy(logits, batch.target, reduction="none")


def train(adapter, module, steps: int = 3) -> None:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(steps):
        losses(adapter, module, batch_of(SAMPLES)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def streamed(module):
    return ((name, parameter.detach().clone()) for name, parameter in module.named_parameters())


def padded():
    """`SAMPLES` as transformers takes them: ids, mask, labels."""
    ids, mask, labels = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6), torch.full((3, 6), -100)
    for row, sample in enumerate(SAMPLES):
        tokens = torch.tensor(sample.segments[0].tokens).long()
        ids[row, : len(tokens)], mask[row, : len(tokens)], labels[row, 1 : len(tokens)] = tokens, 1, tokens[1:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def in_peft(adapter, module, model):
    """The same model under peft itself, with equal values."""
    theirs = get_peft_model(model, adapter.config())
    ours = {name.removeprefix("encoder."): tensor for name, tensor in streamed(module) if name.startswith("encoder.")}
    theirs.prompt_encoder["default"].load_state_dict(ours)
    return theirs


def test_loss_and_gradients_equal_those_of_peft_on_a_padded_batch(adapter, llama, bring_to_life) -> None:
    model = llama()
    module, _ = bring_to_life(adapter, model)
    theirs = in_peft(adapter, module, model)
    expected = theirs(**padded()).loss
    found = losses(adapter, module, batch_of(SAMPLES)).mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    expected.backward()
    found.backward()
    gradients = dict(theirs.prompt_encoder["default"].named_parameters())
    assert gradients
    for name, parameter in gradients.items():
        ours = module.get_parameter(f"encoder.{name}").grad
        assert ours.norm() > 0
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=2e-7)


def test_a_pretrained_model_gives_the_loss_of_peft(adapter, bring_to_life) -> None:
    model = LlamaForCausalLM.from_pretrained(shared("models", "stories260k")).train()
    module, _ = bring_to_life(adapter, model)
    expected = in_peft(adapter, module, model)(**padded()).loss
    torch.testing.assert_close(losses(adapter, module, batch_of(SAMPLES)).mean(), expected, rtol=1e-6, atol=0)


def test_only_the_encoder_is_trained_and_the_base_stays_to_the_bit(adapter, llama, bring_to_life) -> None:
    model = llama()
    module, _ = bring_to_life(adapter, model)
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == name.startswith("encoder."), name
    before = dict(streamed(module))
    train(adapter, module)
    for name, tensor in streamed(module):
        assert torch.equal(tensor, before[name]) != name.startswith("encoder."), name


def test_a_saved_adapter_opens_in_plain_peft(adapter, llama, bring_to_life, tmp_path) -> None:
    model = llama()
    module, _ = bring_to_life(adapter, model)
    train(adapter, module)
    adapter.save(tmp_path / "adapter", streamed(module), "some/base")
    opened = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = opened(**padded()).logits[:, -6:]
        ours = adapter.base(module).lm_head(states(adapter, module, batch_of(SAMPLES)))
    taken = torch.cat([theirs[row, : len(sample.segments[0].tokens) - 1] for row, sample in enumerate(SAMPLES)])
    torch.testing.assert_close(ours, taken, rtol=1e-5, atol=1e-5)
    assert opened.peft_config["default"].base_model_name_or_path == "some/base"
    assert opened.peft_config["default"].num_virtual_tokens == 4


def test_off_is_the_base_to_the_bit_and_ends_also_where_its_body_fails(adapter, llama, bring_to_life, tokens) -> None:
    model = llama()
    module, _ = bring_to_life(adapter, model)
    train(adapter, module)
    with torch.no_grad():
        on = losses(adapter, module, batch_of(SAMPLES))
        with adapter.off(module):
            whole = adapter.base(module)(input_ids=tokens).logits
            decoded = adapter.base(module).get_decoder()(input_ids=tokens).last_hidden_state
        with pytest.raises(ValueError, match="inside"), adapter.off(module):
            raise ValueError("inside")
        assert torch.equal(whole, model(input_ids=tokens).logits)
        assert torch.equal(decoded, model.get_decoder()(input_ids=tokens).last_hidden_state)
        assert torch.equal(losses(adapter, module, batch_of(SAMPLES)), on)


def test_packed_samples_and_a_shared_prompt_compute_as_rows_of_their_own(adapter, llama, bring_to_life) -> None:
    module, _ = bring_to_life(adapter, llama())
    apart, packed = batch_of(SAMPLES), batch_of(SAMPLES, [2, 1])
    torch.testing.assert_close(losses(adapter, module, packed), losses(adapter, module, apart), rtol=1e-5, atol=1e-5)
    shared = [Sample((segment(5, 9, 3), segment(40, 7, parent=0, first=0), segment(8, 8, parent=0, first=0)))]
    chains = [Sample((segment(5, 9, 3, 40, 7),)), Sample((segment(5, 9, 3, 8, 8, first=3),))]
    ours = losses(adapter, module, batch_of(shared))
    torch.testing.assert_close(ours, losses(adapter, module, batch_of(chains)), rtol=1e-5, atol=1e-5)


def test_a_batch_without_samples_calls_the_encoder_and_gives_zero_gradients(adapter, llama, bring_to_life) -> None:
    module, _ = bring_to_life(adapter, llama())
    calls = []
    module.encoder.register_forward_hook(lambda *_: calls.append(1))
    states(adapter, module, batch_of([])).sum().backward()
    assert calls == [1]
    assert all(not p.grad.any() for p in module.encoder.parameters())


def test_virtual_tokens_have_dropout_keys_of_their_sample_however_laid(adapter, llama, bring_to_life) -> None:
    module, _ = bring_to_life(adapter, llama())

    def keys(batch):
        given, _ = adapter.inputs(module, batch, lambda one: {"attention_mask": torch.ones_like(one.tokens)})
        return set(batch_keys(given)[given.segments >= 0].tolist())

    apart = keys(batch_of(SAMPLES))
    assert keys(batch_of(SAMPLES, [2, 1])) == apart
    assert len(apart) == 13 + (0 if isinstance(adapter, Prefix) else 3 * 4)


def prompts():
    """Two prompts padded on the left."""
    return torch.tensor([[0, 0, 5, 9, 3], [11, 2, 30, 1, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def generated(model, ids, mask, cached=True):
    """Greedy tokens `(rows, 8)` and the logits that chose them `(rows, 8, vocabulary)`."""
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": cached}
    told = {"return_dict_in_generate": True, "output_logits": True}
    made = model.generate(input_ids=ids, attention_mask=mask, **how, **told)
    return made.sequences[:, ids.shape[1] :], torch.stack(made.logits, 1)


@pytest.mark.parametrize("cached", [True, False])
def test_generation_equals_that_of_peft_and_padding_changes_nothing(cached, adapter, llama, bring_to_life) -> None:
    model = llama()
    module, _ = bring_to_life(adapter, model)
    train(adapter, module)
    ids, mask = torch.tensor([[0, 0, 5, 9, 3], [11, 2, 30, 1, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    base, theirs = adapter.base(module).eval(), in_peft(adapter, module, model).eval()
    ours, logits = generated(base, ids, mask, cached)
    for row, kept in enumerate(mask.bool()):
        alone = ids[row : row + 1, kept]
        tokens, expected = generated(theirs, alone, torch.ones_like(alone))
        assert torch.equal(ours[row], tokens[0])
        torch.testing.assert_close(logits[row], expected[0], rtol=1e-5, atol=1e-5)
    with adapter.off(module):
        _, plain = generated(base, ids, mask, cached)
    assert (plain - logits).abs().max() > 1e-2


def test_a_sliding_window_counts_no_padding(llama, bring_to_life) -> None:
    """A window of four tokens, over which virtual tokens and a prompt go."""
    adapter, model = METHODS["prompt"](), llama()
    config = MistralConfig(**{**model.config.to_dict(), "model_type": "mistral", "sliding_window": 4})
    windowed = MistralForCausalLM(config).eval()
    windowed.load_state_dict(model.state_dict(), strict=False)
    weights = {name: tensor.detach() for name, tensor in windowed.named_parameters()}
    woven, source = adapter.weave(windowed, InMemory(weights), 7)
    with torch.no_grad():
        woven.encoder.embedding.weight.copy_(source.read("encoder.embedding.weight"))
    short, padded_left = torch.tensor([[5, 9, 3]]), torch.tensor([[0, 0, 5, 9, 3]])
    tokens, expected = generated(windowed, short, torch.ones_like(short))
    ours, logits = generated(windowed, padded_left, torch.tensor([[0, 0, 1, 1, 1]]))
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_source_knows_names_and_shapes_and_slices_are_those_of_the_whole(adapter, llama, bring_to_life) -> None:
    module, source = bring_to_life(adapter, llama())
    assert source.shapes() == {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, shape in source.shapes().items():
        parts = [source.read(name, (slice(0, shape[0] // 2),)), source.read(name, (slice(shape[0] // 2, None),))]
        assert torch.equal(torch.cat(parts), source.read(name)), name


def test_first_values_follow_from_the_seed_alone(adapter, llama, bring_to_life) -> None:
    state = torch.get_rng_state()
    one, other = (bring_to_life(adapter, llama(), seed)[1] for seed in (7, 8))
    again = bring_to_life(adapter, llama(), 7)[1]
    added = [name for name in one.shapes() if name.startswith("encoder.")]
    torch.set_rng_state(state)
    for name in added:
        assert torch.equal(one.read(name), again.read(name))
        assert not torch.equal(one.read(name), other.read(name))
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_embeddings_stay_tied(adapter, llama, bring_to_life) -> None:
    model = llama(tied=True)
    module, _ = bring_to_life(adapter, model)
    base = adapter.base(module)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    expected = in_peft(adapter, module, model)(**padded()).loss
    torch.testing.assert_close(losses(adapter, module, batch_of(SAMPLES)).mean(), expected, rtol=1e-6, atol=0)


def test_merging_is_refused_with_the_exporter_that_writes_it(adapter) -> None:
    with pytest.raises(UserError, match=r"(?s)cannot be merged.*--to adapter"):
        adapter.merged(iter(()))


def test_names_lead_back_to_the_base(adapter, llama, bring_to_life) -> None:
    model = llama()
    module, _ = bring_to_life(adapter, model)
    names = [adapter.base_name(name) for name, _ in module.named_parameters()]
    assert [name for name in names if name] == [name for name, _ in model.named_parameters()]
    assert names.count(None) == sum(parameter.requires_grad for parameter in module.parameters())
    assert not adapter.saves_base and adapter.learning_rate_scale("encoder.embedding.weight") == 1


@pytest.mark.parametrize(
    "method",
    [(Prompt, PromptSettings), (Ptuning, PtuningSettings), (Prefix, PrefixSettings)],
    ids=lambda m: m[0].__name__,
)
def test_a_length_without_sense_is_refused(method) -> None:
    build, settings = method
    with pytest.raises(UserError, match=r"(?s)adapter.length=0 .*at least 1"):
        build(settings(length=0))


def test_all_three_say_that_they_put_virtual_tokens_and_can_be_off() -> None:
    found = {offer.name: offer.provides for offer in adapters() if Trait.VIRTUAL_TOKENS in offer.provides}
    assert found.keys() == {"prompt", "ptuning", "prefix"}
    assert all(Trait.ADAPTER_OFF in provides for provides in found.values())
