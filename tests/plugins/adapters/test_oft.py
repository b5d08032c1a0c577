"""OFT and COFT: what is rotated, what peft makes of it, and how it leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from loomtune.contracts import ParameterGroup
from loomtune.errors import UserError
from loomtune_plugins.adapters.oft import Coft, Oft
from loomtune_plugins.adapters.oft_settings import CoftSettings, OftSettings
from loomtune_plugins.optimizers.settings import SGDSettings
from loomtune_plugins.optimizers.sgd import SGD

CHOICES = [
    OftSettings(block_size=4),
    OftSettings(block_size=8, neumann_terms=0),
    OftSettings(blocks=2, targets=["q_proj", "mlp.*"]),
    OftSettings(block_size=4, block_share=True, neumann_terms=2),
]


@pytest.fixture(params=CHOICES, ids=["series", "solved", "counted", "shared"])
def settings(request) -> OftSettings:
    return request.param


def stir(module) -> None:
    """Moves what was added away from where it starts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def logits(module, tokens):
    with torch.no_grad():
        return module(input_ids=tokens).logits


def streamed(module):
    return ((name, parameter.detach().clone()) for name, parameter in module.named_parameters())


def trained(module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_only_rotations_are_trained_and_the_model_starts_as_its_base(settings, llama, bring_to_life, tokens) -> None:
    model = llama()
    module, source = bring_to_life(Oft(settings), model)
    assert source.shapes() == {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert all(parameter.requires_grad == ("oft_R" in name) for name, parameter in module.named_parameters())
    torch.testing.assert_close(logits(module, tokens), logits(model, tokens), atol=1e-6, rtol=1e-6)


def test_slices_of_first_values_are_those_of_the_whole(settings, llama, bring_to_life) -> None:
    _, source = bring_to_life(Oft(settings), llama())
    for name, shape in source.shapes().items():
        half = shape[0] // 2
        parts = [source.read(name, (slice(0, half),)), source.read(name, (slice(half, None),))]
        assert torch.equal(torch.cat(parts), source.read(name)), name


def test_loss_and_gradients_are_those_of_peft(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), Oft(settings)
    module, _ = bring_to_life(adapter, model)
    stir(module)
    theirs = get_peft_model(copy.deepcopy(model), adapter.config(adapter.layers(model)))
    assert trained(theirs).keys() == adapter.names.files.keys()
    with torch.no_grad():
        for name, parameter in trained(theirs).items():
            parameter.copy_(module.get_parameter(name))
    losses = [each(input_ids=tokens, labels=tokens).loss for each in (module, theirs)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, parameter in trained(theirs).items():
        torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, atol=1e-7, rtol=1e-6)


def test_off_gives_the_base_bit_for_bit_and_training_leaves_it_alone(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), Oft(settings)
    module, _ = bring_to_life(adapter, model)
    optimizer = torch.optim.AdamW(trained(module).values(), lr=0.01)
    for _ in range(3):
        module(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(module, tokens)
    with adapter.off(module):
        assert torch.equal(logits(module, tokens), logits(model, tokens))
    assert not torch.equal(after, logits(model, tokens))
    ours = {adapter.base_name(name): tensor for name, tensor in streamed(module)}
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.named_parameters())


def test_merged_computes_as_the_adapter_does_and_keeps_the_type(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), Oft(settings)
    module, _ = bring_to_life(adapter, model)
    stir(module)
    ours = dict(adapter.merged(streamed(module)))
    assert ours.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(ours)
    torch.testing.assert_close(logits(model, tokens), logits(module, tokens), atol=1e-5, rtol=1e-5)
    halves = ((name, tensor if "oft_" in name else tensor.bfloat16()) for name, tensor in streamed(module))
    assert {tensor.dtype for _, tensor in adapter.merged(halves)} == {torch.bfloat16}


def test_a_saved_adapter_opens_in_plain_peft(settings, llama, bring_to_life, tokens, tmp_path) -> None:
    model, adapter = llama(), Oft(settings)
    module, _ = bring_to_life(adapter, model)
    stir(module)
    adapter.save(tmp_path, streamed(module), "some/base")
    opened = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(opened, tokens), logits(module, tokens))
    assert not torch.equal(logits(opened, tokens), logits(llama(), tokens))


@pytest.mark.parametrize("share", [False, True])
def test_a_constrained_run_is_that_of_peft_step_by_step(share, llama, bring_to_life, tokens, tmp_path) -> None:
    settings = CoftSettings(block_size=4, block_share=share, eps=0.02)
    model, adapter = llama(), Coft(settings)
    module, _ = bring_to_life(adapter, model)
    inner = SGD(SGDSettings(lr=0.05))
    ours = adapter.optimizer(inner, 6).build([ParameterGroup(list(trained(module).values()), True, 1.0)])
    config = adapter.config(adapter.layers(model))
    config.coft, config.eps = True, settings.eps
    theirs = get_peft_model(copy.deepcopy(model), config)
    reference = torch.optim.SGD(trained(theirs).values(), lr=0.05)
    for _ in range(6):
        losses = [each(input_ids=tokens, labels=tokens).loss for each in (module, theirs)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
        for loss, optimizer in zip(losses, (ours, reference), strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    logits(theirs, tokens)  # peft projects before it computes
    for name, parameter in trained(theirs).items():
        torch.testing.assert_close(module.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        lengths = [(2 * len(p)) ** 0.5 * p.norm(dim=1).max().item() for p in trained(module).values()]
    assert max(lengths) == pytest.approx(0.02, rel=1e-5), "the ball was reached, and not left"
    adapter.save(tmp_path, streamed(module), "base")
    opened = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(opened, tokens), logits(module, tokens))
    assert (opened.peft_config["default"].coft, opened.peft_config["default"].eps) == (True, 0.02)


def test_blocks_that_do_not_divide_a_layer_are_refused_with_the_nearest_that_do(llama) -> None:
    with pytest.raises(UserError, match=r"(?s)block_size=32 does not divide the 16 inputs.*q_proj.*block_size=8"):
        Oft(OftSettings()).layers(llama())
    with pytest.raises(UserError, match=r"(?s)adapter.blocks=3 does not divide the 16 inputs.*adapter.blocks=2"):
        Oft(OftSettings(blocks=3)).layers(llama())
    with pytest.raises(UserError, match=r"(?s)adapter.blocks=8 does not divide the 8 inputs.*adapter.blocks=4"):
        Oft(OftSettings(blocks=8)).layers(torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)}))
    odd = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(9, 9)})
    with pytest.raises(UserError, match=r"(?s)the 9 inputs of layer 'b'.*leave the layer out of adapter.targets"):
        Oft(OftSettings(block_size=4)).layers(odd)


def test_settings_without_sense_are_refused_all_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Oft(OftSettings(block_size=1, blocks=0, neumann_terms=1, targets=[]))
    assert [fault.what.split("=")[0] for fault in caught.value.faults] == [
        f"adapter.{key}" for key in ("block_size", "blocks", "neumann_terms", "targets")
    ]
    with pytest.raises(UserError, match=r"block_size=4 stands beside adapter.blocks=2"):
        Oft(OftSettings(block_size=4, blocks=2))
    with pytest.raises(UserError, match=r"adapter.eps=0.0 rotates nothing"):
        Coft(CoftSettings(eps=0.0))
