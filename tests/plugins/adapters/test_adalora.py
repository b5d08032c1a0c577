"""AdaLoRA: what is added, and that a run of it is a run of peft's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from torch.nn import functional as F

from loomtune.contracts import ParameterGroup, StateKind
from loomtune.errors import UserError
from loomtune_plugins.adapters.adalora import AdaLora
from loomtune_plugins.adapters.adalora_budget import Allocator
from loomtune_plugins.adapters.adalora_settings import AdaLoraSettings, too_short
from loomtune_plugins.optimizers.adamw import AdamW
from loomtune_plugins.optimizers.settings import AdamWSettings

STEPS = 12
SETTINGS = AdaLoraSettings(init_rank=6, target_rank=2, alpha=8, tinit=2, tfinal=3, delta_t=2, orth_reg_weight=0.3)


def loss(module, tokens) -> torch.Tensor:
    """Without labels, for which peft's model would add the penalty by itself."""
    logits = module(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def logits(module, tokens):
    with torch.no_grad():
        return module(input_ids=tokens).logits


def streamed(module):
    return ((name, parameter.detach().clone()) for name, parameter in module.named_parameters())


def trained(module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def optimizer(adapter: AdaLora, module, steps: int = STEPS, lr: float = 0.02) -> torch.optim.Optimizer:
    inner = AdamW(AdamWSettings(lr=lr))
    return adapter.optimizer(inner, steps).build([ParameterGroup(list(trained(module).values()), True, 1.0)])


def train(module, tokens, taking: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        loss(module, tokens).backward()
        taking.step()
        taking.zero_grad()


def twin(adapter: AdaLora, model, module):
    """peft's own, on a loaded model, starting where ours does."""
    config = adapter.config(adapter.layers(model), task_type="CAUSAL_LM")  # without it, peft leaves the penalty out
    theirs = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in trained(theirs).items():
            parameter.copy_(module.get_parameter(name))
    assert trained(theirs).keys() == trained(module).keys() == adapter.names.files.keys()
    return theirs


def ranks(module) -> list[int]:
    return [int((p != 0).sum()) for name, p in module.named_parameters() if "lora_E" in name]


def test_a_woven_model_starts_as_its_base_and_trains_the_three_factors(llama, bring_to_life, tokens) -> None:
    model = llama()
    module, source = bring_to_life(AdaLora(SETTINGS), model)
    assert source.shapes() == {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in module.named_parameters())
    torch.testing.assert_close(logits(module, tokens), logits(model, tokens), atol=1e-6, rtol=1e-6)


def test_first_values_are_drawn_as_peft_draws_them_from_seed_and_layer(llama, bring_to_life) -> None:
    source, other = (bring_to_life(AdaLora(SETTINGS), llama(), seed)[1] for seed in (7, 8))
    drawn = [name for name in source.shapes() if "lora_A" in name or "lora_B" in name]
    values = torch.cat([source.read(name).flatten() for name in drawn])
    assert values.std().item() == pytest.approx(0.02, rel=0.05)
    assert len({source.read(name).flatten()[0].item() for name in drawn}) == len(drawn)
    assert not torch.equal(source.read(drawn[0]), other.read(drawn[0]))
    assert all(not source.read(name).any() for name in source.shapes() if "lora_E" in name)


def test_slices_of_first_values_are_those_of_the_whole(llama, bring_to_life) -> None:
    _, source = bring_to_life(AdaLora(SETTINGS), llama())
    for name, shape in source.shapes().items():
        half = shape[0] // 2
        parts = [source.read(name, (slice(0, half),)), source.read(name, (slice(half, None),))]
        assert torch.equal(torch.cat(parts), source.read(name)), name


@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_a_run_is_that_of_peft_step_by_step(weight, llama, bring_to_life, tokens) -> None:
    model = llama()
    adapter = AdaLora(replace(SETTINGS, orth_reg_weight=weight))
    module, _ = bring_to_life(adapter, model)
    ours = optimizer(adapter, module)
    peft = twin(adapter, model, module)
    reference = torch.optim.AdamW(list(trained(peft).values()), lr=0.02, weight_decay=0.01, fused=True)
    budgets = []
    for step in range(1, STEPS + 1):
        mine = loss(module, tokens)
        plain = loss(peft, tokens)
        assert mine.item() == pytest.approx(plain.item(), rel=1e-6)
        mine.backward()
        peft(input_ids=tokens, labels=tokens).loss.backward()
        ours.step()
        reference.step()
        for name, parameter in trained(peft).items():  # with the penalty, which is added before a step
            torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, atol=1e-6, rtol=1e-4)
        peft.base_model.update_and_allocate(step)
        assert ranks(module) == ranks(peft)
        budgets.append(sum(ranks(module)))
        ours.zero_grad()
        reference.zero_grad()
    assert budgets[2:4] == [84, 48] and budgets[-4:] == [28] * 4  # tinit, the first sharing-out, tfinal
    assert len(set(ranks(module))) > 1, "ranks differ among layers"
    for name, parameter in trained(peft).items():
        torch.testing.assert_close(module.get_parameter(name), parameter, atol=1e-5, rtol=1e-5)


def test_what_is_kept_is_declared_and_enough_to_go_on_after_a_resume(llama, bring_to_life, tokens) -> None:
    adapter = AdaLora(SETTINGS)
    whole, _ = bring_to_life(adapter, llama())
    train(whole, tokens, taking := optimizer(adapter, whole), STEPS)
    declared = adapter.optimizer(AdamW(AdamWSettings()), STEPS).state()
    assert declared["exp_avg_ipt"] == declared["exp_avg_unc"] == StateKind.LIKE
    for state in taking.state.values():
        assert state.keys() == declared.keys()
    for stop in (5, 10):  # while ranks fall, and when they stand
        again = AdaLora(SETTINGS)
        module, _ = bring_to_life(again, llama())
        train(module, tokens, before := optimizer(again, module), stop)
        resumed = AdaLora(SETTINGS)
        successor, _ = bring_to_life(resumed, llama())
        successor.load_state_dict(module.state_dict())
        after = optimizer(resumed, successor)
        for old, new in zip(trained(module).values(), trained(successor).values(), strict=True):
            after.state[new] = {key: value.clone() for key, value in before.state[old].items()}
        train(successor, tokens, after, STEPS - stop)
        assert all(torch.equal(p, whole.get_parameter(name)) for name, p in successor.named_parameters())


@pytest.mark.parametrize(("tinit", "tfinal", "delta_t"), [(0, 0, 1), (3, 2, 1), (4, 3, 2), (0, 5, 3)])
def test_the_budget_falls_as_that_of_peft(tinit, tfinal, delta_t) -> None:
    settings = replace(SETTINGS, tinit=tinit, tfinal=tfinal, delta_t=delta_t)
    layers = [{"lora_E": torch.nn.Parameter(torch.zeros(6, 1))} for _ in range(5)]
    ours = Allocator(torch.optim.SGD([layer["lora_E"] for layer in layers]), settings, STEPS, layers)
    adapter = AdaLora(settings)
    adapter.optimizer(AdamW(AdamWSettings()), STEPS)
    named = torch.nn.ParameterDict({f"{i}.lora_A.default".replace(".", "!"): torch.zeros(6, 3) for i in range(5)})
    named.named_parameters = lambda: ((name.replace("!", "."), p) for name, p in named.items())
    theirs = RankAllocator(named, adapter.config(["q_proj"]), "default")
    for step in range(1, STEPS + 1):
        budget, masks = theirs.budget_schedule(step)
        assert ours.budget(step) == (budget if masks or step == STEPS - tfinal else None), step


def test_a_run_that_goes_back_decides_again_which_entries_stay(llama, bring_to_life, tokens) -> None:
    def run(first, back: bool) -> list[int]:
        """Five steps on some tokens, the rest on others; before that, where it goes back, the rest on the first."""
        adapter = AdaLora(replace(SETTINGS, delta_t=100))
        module, _ = bring_to_life(adapter, llama())
        train(module, tokens, taking := optimizer(adapter, module), 5)
        kept = {name: p.detach().clone() for name, p in trained(module).items()}
        state = {p: {key: value.clone() for key, value in taking.state[p].items()} for p in trained(module).values()}
        if back:
            train(module, tokens, taking, STEPS - 5)
            taking.state.update(state)
            with torch.no_grad():
                for name, value in kept.items():
                    module.get_parameter(name).copy_(value)
        train(module, first, taking, STEPS - 5)
        return ranks(module)

    others = (tokens * 7 + 3) % 48
    assert run(others, back=True) == run(others, back=False) != run(tokens, back=False)


def test_equal_ranks_share_out_nothing(llama, bring_to_life, tokens) -> None:
    adapter = AdaLora(AdaLoraSettings(init_rank=4, target_rank=4, tinit=0, tfinal=1, delta_t=1))
    module, _ = bring_to_life(adapter, llama())
    train(module, tokens, optimizer(adapter, module, 4), 4)
    assert ranks(module) == [4] * 14


def test_off_gives_the_base_bit_for_bit_and_training_leaves_it_alone(llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), AdaLora(SETTINGS)
    module, _ = bring_to_life(adapter, model)
    train(module, tokens, optimizer(adapter, module), 4)
    after = logits(module, tokens)
    with adapter.off(module):
        assert torch.equal(logits(module, tokens), logits(model, tokens))
    assert not torch.equal(after, logits(model, tokens))
    ours = {adapter.base_name(name): tensor for name, tensor in streamed(module)}
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.named_parameters())


def test_merged_computes_as_the_adapter_does_and_keeps_the_type_of_the_base(llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), AdaLora(SETTINGS)
    module, _ = bring_to_life(adapter, model)
    train(module, tokens, optimizer(adapter, module), STEPS)
    ours = dict(adapter.merged(streamed(module)))
    assert ours.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(ours)
    torch.testing.assert_close(logits(model, tokens), logits(module, tokens), atol=1e-5, rtol=1e-5)
    halves = ((name, tensor if "lora_" in name else tensor.bfloat16()) for name, tensor in streamed(module))
    assert {tensor.dtype for _, tensor in adapter.merged(halves)} == {torch.bfloat16}


@pytest.mark.parametrize("steps", [4, STEPS])
def test_a_saved_adapter_opens_in_plain_peft_with_ranks_that_fell(
    steps, llama, bring_to_life, tokens, tmp_path
) -> None:
    model, adapter = llama(), AdaLora(SETTINGS)
    module, _ = bring_to_life(adapter, model)
    train(module, tokens, optimizer(adapter, module), steps)
    adapter.save(tmp_path, streamed(module), "some/base")
    opened = PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(opened, tokens), logits(module, tokens), atol=1e-6, rtol=1e-6)
    config = opened.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal, config.init_r) == (STEPS, 2, 3, 6)


def test_settings_without_sense_are_refused_all_at_once(llama) -> None:
    with pytest.raises(UserError) as caught:
        AdaLora(
            AdaLoraSettings(
                init_rank=0, target_rank=0, alpha=0, dropout=1.0, targets=[], tinit=-1, tfinal=-1, delta_t=0, beta1=1.0,
                beta2=0.0, orth_reg_weight=-1.0,
            )
        )  # fmt: skip
    assert [fault.what.split("=")[0].removeprefix("adapter.") for fault in caught.value.faults] == [
        "init_rank", "target_rank", "alpha", "dropout", "targets", "delta_t", "beta1", "beta2", "orth_reg_weight",
        "tinit", "tfinal",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"(?s)target_rank=8 is more than adapter.init_rank=4.*at most 4"):
        AdaLora(AdaLoraSettings(init_rank=4))
    with pytest.raises(UserError, match=r"(?s)adapter.init_rank=12.*k_proj' \(16 to 8\).*at most 8"):
        AdaLora(AdaLoraSettings()).layers(llama())


def test_a_run_too_short_for_ranks_to_fall_is_refused() -> None:
    with pytest.raises(UserError, match=r"(?s)tinit=2 and adapter.tfinal=3 leave none of 5 steps.*at most 4"):
        AdaLora(SETTINGS).optimizer(AdamW(AdamWSettings()), 5)
    assert all(too_short(AdaLoraSettings(), steps) is None for steps in range(1, 40))
