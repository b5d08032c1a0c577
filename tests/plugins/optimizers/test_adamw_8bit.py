"""Moments of 8 bits: bitsandbytes' own updates, state that a checkpoint can hold, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from loomtune.contracts import ParameterGroup, StateKind
from loomtune.errors import UserError
from loomtune_plugins.optimizers.adamw import AdamW
from loomtune_plugins.optimizers.adamw_8bit import AdamW8bit
from loomtune_plugins.optimizers.adamw_8bit_settings import AdamW8bitSettings
from loomtune_plugins.optimizers.settings import AdamWSettings

optim = pytest.importorskip("bitsandbytes.optim", reason="the extra `quantised` is not installed")

USUAL = {"lr": 1e-2, "weight_decay": 0.1}


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    """A large one, whose moments have 8 bits, and a small one."""
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(80, 70, generator=generator)), nn.Parameter(torch.randn(70, generator=generator))


def grouped(large: nn.Parameter, small: nn.Parameter) -> list[ParameterGroup]:
    return [ParameterGroup([large], True, 1.0), ParameterGroup([small], False, 1.0)]


def train(optimizer: torch.optim.Optimizer, tensors, steps: int = 4, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()


def test_updates_are_those_of_bitsandbytes() -> None:
    ours, theirs = parameters(), parameters()
    train(AdamW8bit(AdamW8bitSettings(**USUAL)).build(grouped(*ours)), ours)
    groups = [{"params": [theirs[0]], "weight_decay": 0.1}, {"params": [theirs[1]], "weight_decay": 0.0}]
    train(optim.AdamW8bit(groups, lr=1e-2), theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_small_parameters_are_updated_as_by_plain_adamw_and_large_ones_nearly() -> None:
    ours, plain = parameters(), parameters()
    start = parameters()[0]
    train(AdamW8bit(AdamW8bitSettings(**USUAL)).build(grouped(*ours)), ours)
    train(AdamW(AdamWSettings(**USUAL)).build(grouped(*plain)), plain)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-5, atol=1e-6)
    apart, moved = (ours[0] - plain[0]).norm(), (plain[0] - start).norm()
    assert 0 < apart < 0.1 * moved


def test_paged_moments_of_32_bits_are_plain_adamw_and_a_cpu_has_no_pages(capsys) -> None:
    ours, plain = parameters(), parameters()
    optimizer = AdamW8bit(AdamW8bitSettings(bits=32, paged=True, **USUAL))
    train(optimizer.build(grouped(*ours)), ours)
    train(AdamW(AdamWSettings(**USUAL)).build(grouped(*plain)), plain)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert set(optimizer.state().values()) == {StateKind.LIKE, StateKind.SCALAR}


def test_no_effect_is_said_once(capsys, recwarn) -> None:
    from loomtune_plugins.optimizers import adamw_8bit

    adamw_8bit._say.cache_clear()
    for _ in range(2):
        train(AdamW8bit(AdamW8bitSettings(paged=True)).build(grouped(*(ours := parameters()))), ours)
    assert capsys.readouterr().err.count("optimizer.paged has no effect on a CPU") == 1
    assert not [one for one in recwarn if "aged" in str(one.message)]


@pytest.mark.parametrize("bits", [8, 32])
def test_the_state_that_is_kept_is_the_state_that_was_declared(bits: int) -> None:
    ours, optimizer = parameters(), AdamW8bit(AdamW8bitSettings(bits=bits, paged=bits == 32))
    built = optimizer.build(grouped(*ours))
    train(built, ours)
    for parameter in ours:
        state = built.state[parameter]
        assert state.keys() == optimizer.state().keys()
        assert state["state1"].shape == parameter.shape and state["step"] == 4
    kept = built.state[ours[0]]["state1"].dtype, built.state[ours[1]]["state1"].dtype
    assert kept == (torch.uint8 if bits == 8 else torch.float32, torch.float32)
    assert set(built.state) == set(ours), "no part is kept beside its parameter"


def test_an_optimizer_goes_on_from_its_state_to_the_bit() -> None:
    ours, optimizer = parameters(), AdamW8bit(AdamW8bitSettings(**USUAL))
    built = optimizer.build(grouped(*ours))
    train(built, ours)
    others = tuple(nn.Parameter(parameter.detach().clone()) for parameter in ours)
    resumed = optimizer.build(grouped(*others))
    for parameter, other in zip(ours, others, strict=True):  # as a checkpoint gives it: declared tensors alone
        state = {name: torch.as_tensor(built.state[parameter][name]) for name in optimizer.state()}
        resumed.state[other] = copy.deepcopy(state)
    train(built, ours, seed=2)
    train(resumed, others, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bits": 4}, r"moments of 4 bits are not known\n.*set optimizer\.bits to 8 or 32"),
        ({"bits": 32}, r"optimizer\.bits=32 without pages is plain AdamW\n.*set optimizer=adamw"),
        ({"lr": -1.0}, r"optimizer\.lr=-1\.0"),
        ({"beta2": 1.0}, r"optimizer\.beta2=1\.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, said) -> None:
    with pytest.raises(UserError, match=said):
        AdamW8bit(AdamW8bitSettings(**wrong))
