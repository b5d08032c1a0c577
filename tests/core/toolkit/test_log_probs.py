"""Log-probabilities: the textbook's numbers and gradients, in whatever pieces they are computed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from loomtune.batching import collate
from loomtune.contracts import Role, View
from loomtune.testing import toy
from loomtune.toolkit import log_probs as public
from loomtune.toolkit import row_sums
from loomtune.toolkit.log_probs import target_log_probs

log_probs_module = __import__("sys").modules["loomtune.toolkit.log_probs"]

TARGETS, WIDTH, VOCABULARY = 150, 8, 31


def material(seed: int = 0) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, VOCABULARY)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(TARGETS, WIDTH, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(VOCABULARY, (TARGETS,), generator=generator)


def plain(hidden: Tensor, head: nn.Module, target: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(head(hidden) / temperature, -1).gather(1, target.unsqueeze(1)).squeeze(1)


def differentiated(compute: Callable[..., Tensor], temperature: float) -> list[Tensor]:
    """Values, then gradients of a weighted sum of them: of the hidden states, the weight and the bias."""
    hidden, head, target = material()
    values = compute(hidden, head, target, temperature)
    (values * torch.linspace(-1, 2, TARGETS)).sum().backward()
    assert hidden.grad is not None and head.weight.grad is not None and head.bias.grad is not None
    return [values.detach(), hidden.grad, head.weight.grad, head.bias.grad]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 64, 75, 149, 150, 1024])
def test_chunks_give_the_values_and_gradients_of_the_whole(
    chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs_module, "CHUNK", chunk)
    for ours, theirs in zip(
        differentiated(target_log_probs, temperature), differentiated(plain, temperature), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_more_than_a_chunk_of_logits_exists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs_module, "CHUNK", 64)
    hidden, head, target = material()
    seen: list[int] = []
    head.register_forward_hook(lambda module, given, logits: seen.append(len(logits)))
    values = target_log_probs(hidden, head, target)
    assert seen == [64, 64, 22]
    values.sum().backward()
    assert sorted(seen[3:]) == [22, 64, 64], "computed again instead of kept"


def test_nothing_to_predict_is_nothing_and_reaches_the_parameters() -> None:
    hidden, head, target = material()
    values = target_log_probs(hidden[:0], head, target[:0])
    assert values.shape == (0,)
    values.sum().backward()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_logits_in_half_precision_are_normalised_in_fp32() -> None:
    hidden, head, target = material()
    half = target_log_probs(hidden.bfloat16(), head.bfloat16(), target)
    logits = head(hidden.bfloat16()).float()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, torch.log_softmax(logits, -1)[torch.arange(TARGETS), target])


class Squaring(nn.Module):
    """A head that needs its own output again in the backward pass."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.head(x))


def test_a_head_that_kept_its_logits_hears_an_error_and_no_wrong_number() -> None:
    hidden, head, target = material()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        target_log_probs(hidden, Squaring(head), target).sum().backward()


def test_a_role_reads_through_its_head_only_what_predicts() -> None:
    hidden, head, target = material()
    seen: list[int] = []
    head.register_forward_hook(lambda module, given, logits: seen.append(len(logits)))

    def forward(batch: object, reader: Callable[[View], Tensor], *, adapter: bool) -> Tensor:
        parts = [slice(0, 100), torch.arange(100, TARGETS)]
        return torch.cat([reader(View(hidden[part], part, {"lm": head}, {})) for part in parts])

    role = Role("policy", SimpleNamespace(forward=forward))  # type: ignore[arg-type]
    found = public(role, SimpleNamespace(target=target), temperature=0.5)  # type: ignore[arg-type]
    torch.testing.assert_close(found, plain(hidden, head, target, 0.5), rtol=1e-5, atol=1e-5)
    assert seen[:2] == [100, 50], "an engine may show the targets in parts"


def test_row_sums_go_by_segment_and_a_segment_without_targets_has_0() -> None:
    from toys import sample

    batch = collate([sample("ab"), sample(""), sample("c")], range(3), toy.ToyTokenizer.pad_id)
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = row_sums(values, batch)
    assert sums.tolist() == [3.0, 0.0, 4.0]
    (sums * torch.tensor([1.0, 5.0, 7.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 1.0, 7.0]


def test_sums_of_thousands_of_nats_keep_what_answers_differ_by() -> None:
    from toys import sample

    batch = collate([sample("a" * 120), sample("b" * 120)], range(2), toy.ToyTokenizer.pad_id)
    values = torch.full((len(batch.target),), -30.000002)  # one unit in the last place from -30
    other = torch.full_like(values, -30.0)
    assert row_sums(values, batch).dtype == torch.float64
    exact = values[0].double() - other[0].double()
    counts = torch.bincount(batch.row).double()
    torch.testing.assert_close(row_sums(values, batch) - row_sums(other, batch), counts * exact, rtol=1e-6, atol=0)
