"""Log-probabilities written over the logits are right, and nobody gets a wrong number for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loomtune.toolkit.log_probs import target_log_probs

TARGETS, WIDTH, VOCABULARY = 150, 8, 40


@pytest.fixture
def parts() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TARGETS, WIDTH, requires_grad=True)
    return hidden, nn.Linear(WIDTH, VOCABULARY), torch.randint(0, VOCABULARY, (TARGETS,))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_cross_entropy(
    parts: tuple[Tensor, nn.Linear, Tensor], temperature: float
) -> None:
    hidden, head, target = parts
    factors = torch.linspace(-1, 2, TARGETS)  # every target has a gradient of its own
    expected = -F.cross_entropy(head(hidden) / temperature, target, reduction="none")
    wanted = torch.autograd.grad((expected * factors).sum(), [hidden, *head.parameters()])
    found = target_log_probs(hidden, head, target, temperature)
    got = torch.autograd.grad((found * factors).sum(), [hidden, *head.parameters()])
    torch.testing.assert_close(found, expected)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_head_that_keeps_its_logits_hears_an_error_and_no_wrong_gradient(
    parts: tuple[Tensor, nn.Linear, Tensor],
) -> None:
    hidden, linear, target = parts

    class Capped(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return torch.tanh(linear(states))  # tanh keeps what it gave for its own backward pass

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        target_log_probs(hidden, Capped(), target).sum().backward()


def test_nothing_is_asked_of_autograd_without_gradients(parts: tuple[Tensor, nn.Linear, Tensor]) -> None:
    hidden, head, target = parts
    with torch.no_grad():
        found = target_log_probs(hidden, head, target)
    torch.testing.assert_close(found, -F.cross_entropy(head(hidden), target, reduction="none").detach())


def test_no_targets_have_no_log_probabilities_and_gradients_of_zero(parts: tuple[Tensor, nn.Linear, Tensor]) -> None:
    hidden, head, target = parts
    target_log_probs(hidden[:0], head, target[:0]).sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_who_differentiates_twice_hears_an_error_and_gets_no_wrong_gradient(
    parts: tuple[Tensor, nn.Linear, Tensor],
) -> None:
    hidden, head, target = parts
    loss = target_log_probs(hidden, head, target).sum()
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)
