"""IA3: what is scaled, what peft makes of it, and how it leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from loomtune.errors import UserError
from loomtune_plugins.adapters.ia3 import IA3
from loomtune_plugins.adapters.ia3_settings import IA3Settings

CHOICES = [
    IA3Settings(),
    IA3Settings(targets=["all-linear"]),
    IA3Settings(targets=["*_proj"], feedforward=["layers.0.mlp.down_proj", "q_proj"]),
]


@pytest.fixture(params=CHOICES, ids=["usual", "all", "chosen"])
def settings(request) -> IA3Settings:
    return request.param


def stir(module) -> None:
    """Moves what was added away from where it starts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def logits(module, tokens):
    with torch.no_grad():
        return module(input_ids=tokens).logits


def streamed(module):
    return ((name, parameter.detach().clone()) for name, parameter in module.named_parameters())


def test_only_the_factors_are_trained_and_the_model_starts_as_its_base(settings, llama, bring_to_life, tokens) -> None:
    model = llama()
    module, source = bring_to_life(IA3(settings), model)
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == ("ia3_l" in name), name
    assert torch.equal(logits(module, tokens), logits(model, tokens))
    assert source.shapes() == {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_slices_of_first_values_are_those_of_the_whole(settings, llama, bring_to_life) -> None:
    _, source = bring_to_life(IA3(settings), llama())
    for name, shape in source.shapes().items():
        half = shape[0] // 2
        parts = [source.read(name, (slice(0, half),)), source.read(name, (slice(half, None),))]
        assert torch.equal(torch.cat(parts), source.read(name)), name


def test_loss_and_gradients_are_those_of_peft(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), IA3(settings)
    module, _ = bring_to_life(adapter, model)
    stir(module)
    config = adapter.config(adapter.layers(model))
    theirs = get_peft_model(copy.deepcopy(model), config)
    trained = dict(module.named_parameters())
    twins = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert twins.keys() == adapter.names.files.keys()
    with torch.no_grad():
        for name, parameter in twins.items():
            parameter.copy_(trained[name])
    losses = [each(input_ids=tokens, labels=tokens).loss for each in (module, theirs)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, parameter in twins.items():
        torch.testing.assert_close(trained[name].grad, parameter.grad, atol=1e-7, rtol=1e-6)


def test_feed_forwards_are_scaled_at_their_inputs(llama, bring_to_life) -> None:
    shapes = bring_to_life(IA3(IA3Settings()), llama())[1].shapes()
    added = {name.split("layers.")[1]: shape for name, shape in shapes.items() if "ia3_l" in name}
    first = {"self_attn.k_proj": (8, 1), "self_attn.v_proj": (8, 1), "mlp.down_proj": (1, 24)}
    assert added == {f"{i}.{name}.ia3_l.default": shape for i in (0, 1) for name, shape in first.items()}


def test_off_gives_the_base_bit_for_bit_and_training_leaves_it_alone(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), IA3(settings)
    module, _ = bring_to_life(adapter, model)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        module(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(module, tokens)
    with adapter.off(module):
        assert torch.equal(logits(module, tokens), logits(model, tokens))
    assert torch.equal(logits(module, tokens), trained)
    assert not torch.equal(trained, logits(model, tokens))
    ours = {adapter.base_name(name): tensor for name, tensor in streamed(module)}
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.named_parameters())


def test_merged_computes_as_the_adapter_does_biases_too(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), IA3(settings)
    module, _ = bring_to_life(adapter, model)
    stir(module)
    ours = dict(adapter.merged(streamed(module)))
    assert ours.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(ours)
    torch.testing.assert_close(logits(model, tokens), logits(module, tokens), atol=1e-5, rtol=1e-5)
    assert torch.equal(
        next(ours[name] for name in ours if name.endswith("k_proj.bias")),
        module.get_submodule("base_model.model.model.layers.0.self_attn.k_proj").base_layer.bias
        * module.get_parameter("base_model.model.model.layers.0.self_attn.k_proj.ia3_l.default").flatten(),
    )


def test_merging_keeps_the_type_of_the_base(llama, bring_to_life) -> None:
    adapter = IA3(IA3Settings())
    module, _ = bring_to_life(adapter, llama())
    halves = ((name, tensor if "ia3_l" in name else tensor.bfloat16()) for name, tensor in streamed(module))
    assert {tensor.dtype for _, tensor in adapter.merged(halves)} == {torch.bfloat16}


def test_a_saved_adapter_opens_in_plain_peft(settings, llama, bring_to_life, tokens, tmp_path) -> None:
    model, adapter = llama(), IA3(settings)
    module, _ = bring_to_life(adapter, model)
    stir(module)
    adapter.save(tmp_path, streamed(module), "some/base")
    opened = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(opened, tokens), logits(module, tokens))
    assert not torch.equal(logits(opened, tokens), logits(llama(), tokens))


def test_files_name_layers_briefly_where_that_tells_the_two_kinds_apart(llama, bring_to_life) -> None:
    def said(settings) -> set[str]:
        adapter = IA3(settings)
        bring_to_life(adapter, llama())
        return adapter.config(adapter._targets).feedforward_modules

    assert said(IA3Settings()) == {"down_proj"}
    assert said(IA3Settings(feedforward=[])) == set()
    assert said(IA3Settings(feedforward=["layers.0.*.down_proj"])) == {"model.layers.0.mlp.down_proj"}


NEOX = GPTNeoXConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
)  # fmt: skip
OPT = OPTConfig(
    vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16
)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: GPTNeoXForCausalLM(NEOX), ["query_key_value", "dense_4h_to_h"]),
        (lambda: OPTForCausalLM(OPT), ["k_proj", "v_proj", "fc2"]),
    ],
)
def test_usual_names_of_other_families_are_known(make, found) -> None:
    with torch.device("meta"):
        model = make()
    adapter = IA3(IA3Settings())
    assert [layer.rpartition(".")[2] for layer in adapter.layers(model)] == found
    assert [layer.rpartition(".")[2] for layer in adapter._feedforward] == found[-1:]


def test_a_model_of_other_names_is_refused_with_what_to_set() -> None:
    model = torch.nn.ModuleDict({"wq": torch.nn.Linear(4, 4), "wk": torch.nn.Linear(4, 4)})
    with pytest.raises(UserError, match=r"(?s)no names.*adapter.targets.*adapter.feedforward.*wq, wk"):
        IA3(IA3Settings()).layers(model)
    assert IA3(IA3Settings(targets=["wk"])).layers(model) == ["wk"]


def test_settings_that_mean_nothing_are_refused(llama) -> None:
    with pytest.raises(UserError, match=r"adapter.targets=\[\] adapts nothing"):
        IA3(IA3Settings(targets=[]))
    with pytest.raises(UserError, match=r"adapter.feedforward names 'up_proj', which matches no layer among the tar"):
        IA3(IA3Settings(feedforward=["up_proj"])).layers(llama())
