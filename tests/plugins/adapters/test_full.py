"""Full fine-tuning trains all but what is frozen, and adds nothing."""

from __future__ import annotations

import pytest
import torch

from loomtune.errors import UserError
from loomtune_plugins.adapters.full import Full
from loomtune_plugins.adapters.settings import FullSettings


def trained(model, *freeze: str) -> list[str]:
    module, source = Full(FullSettings(freeze=list(freeze))).weave(model, None, 0)
    assert module is model and source is None
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def test_everything_is_trained_unless_frozen(llama) -> None:
    names = [name for name, _ in llama().named_parameters()]
    assert trained(llama()) == names
    assert trained(llama(), "model.embed_tokens.weight", "*norm*") == [
        name for name in names if "norm" not in name and "embed" not in name
    ]


def test_a_module_freezes_with_all_it_holds(llama) -> None:
    assert [name for name in trained(llama(), "model.layers.0") if ".layers." in name] == [
        name for name in trained(llama()) if ".layers.1." in name
    ]


def test_a_tied_weight_is_frozen_by_either_name(llama) -> None:
    assert "model.embed_tokens.weight" not in trained(llama(tied=True), "lm_head")


def test_freezing_is_forgotten_by_the_next_weaving(llama) -> None:
    model = llama()
    assert len(trained(model, "model.layers.*")) < len(trained(model))


def test_patterns_that_match_nothing_are_all_named(llama) -> None:
    with pytest.raises(UserError) as caught:
        trained(llama(), "model.embed_token.weight", "lm_head", "layers.7")
    assert len(caught.value.faults) == 2
    assert "Did you mean 'model.embed_tokens.weight'?" in str(caught.value)
    assert "adapter.freeze" in caught.value.faults[1].cure


def test_nothing_left_to_train_is_refused(llama) -> None:
    with pytest.raises(UserError, match="leaves no parameter"):
        trained(llama(), "*")


def test_names_weights_and_files_are_the_base_own(llama, tmp_path) -> None:
    adapter, model = Full(FullSettings()), llama()
    assert adapter.saves_base and adapter.base(model) is model
    assert adapter.base_name("model.norm.weight") == "model.norm.weight"
    assert adapter.learning_rate_scale("model.norm.weight") == 1
    assert dict(adapter.merged(iter([("a", torch.ones(1))]))) == {"a": torch.ones(1)}
    adapter.save(tmp_path, model.named_parameters(), "base")
    assert not list(tmp_path.iterdir())


def test_it_cannot_be_switched_off(llama) -> None:
    with pytest.raises(AssertionError, match="engine of its own"):
        Full(FullSettings()).off(llama())
