"""Learning from a teacher: divergences, chunks, the teacher's model, and recorded numbers of TRL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loomtune.errors import UserError
from loomtune.testing import check_objective, loss_of
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives import distill_divergence
from loomtune_plugins.objectives.distill import Distill
from loomtune_plugins.objectives.distill_divergence import compared, divergence
from loomtune_plugins.objectives.distill_settings import DistillSettings

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[4] / "shared")) / "references"
ROWS = [
    {"prompt": "a loom ", "completion": "weaves cloth"},
    {"messages": [{"role": "user", "content": "warp"}, {"role": "assistant", "content": "and weft"}]},
    {"text": "plain text"},
]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_it_keeps_the_contract(beta: float) -> None:
    check_objective(Distill(DistillSettings(beta=beta, temperature=0.7)), ROWS)


def logits(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_a_divergence_is_the_sum_over_the_vocabulary(beta: float) -> None:
    policy, teacher = ((one / 0.8).double().softmax(-1) for one in (logits(5), logits(5, 1)))
    mixture = beta * teacher + (1 - beta) * policy

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one * (one / other).log()).sum(-1)

    ends = {0.0: kl(teacher, policy), 1.0: kl(policy, teacher)}
    expected = ends[beta] if beta in ends else beta * kl(teacher, mixture) + (1 - beta) * kl(policy, mixture)
    found = divergence(logits(5), logits(5, 1), beta, 0.8)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_teacher_itself_is_nowhere_away(beta: float) -> None:
    assert divergence(logits(3), logits(3), beta).abs().max() < 1e-6


def test_chunks_give_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    head, teacher_head = nn.Linear(6, 11), nn.Linear(4, 11, bias=False)
    hidden, teacher = torch.randn(7, 6, requires_grad=True), torch.randn(7, 4)
    whole = divergence(head(hidden), teacher_head(teacher), 0.3)
    (2.5 * whole.sum()).backward()
    expected = [tensor.grad.clone() for tensor in (hidden, head.weight, head.bias)]
    for tensor in (hidden, head.weight, head.bias, teacher_head.weight):
        tensor.grad = None
    monkeypatch.setattr(distill_divergence, "CHUNK", 3)
    values, seen = compared(hidden, head, teacher, teacher_head, lambda ours, theirs: divergence(ours, theirs, 0.3))
    torch.testing.assert_close(values, whole)
    assert seen.shape == (7, 2) and not seen.requires_grad
    (2.5 * values.sum()).backward()
    for tensor, gradient in zip((hidden, head.weight, head.bias), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
    assert teacher_head.weight.grad is None


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_divergence, "CHUNK", 3)
    seen: list[int] = []

    class Head(nn.Linear):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            seen.append(len(given))
            return super().forward(given)

    kept: list[int] = []
    hidden = torch.randn(8, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        values, _ = compared(hidden, Head(6, 11), torch.randn(8, 6), Head(6, 11), lambda a, b: divergence(a, b, 0.5))
        values.sum().backward()
    assert seen == [3, 3, 3, 3, 2, 2] and max(kept) <= 6 * 11


def test_values_that_are_weighted_apart_are_not_taken() -> None:
    hidden = torch.randn(4, 6, requires_grad=True)
    values, _ = compared(hidden, nn.Linear(6, 11), torch.randn(4, 6), nn.Linear(6, 11), lambda a, b: (a - b).sum(-1))
    with pytest.raises(AssertionError, match="equal weights"):
        (values * torch.arange(4.0)).sum().backward()


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="the teacher has 12 logits for each token and the policy 11"):
        divergence(logits(3), torch.zeros(3, 12), 0.5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"beta": 1.5}, "beta=1.5"), ({"temperature": 0.0}, "temperature=0.0"), ({"turns": "none"}, "turns=none")],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Distill(DistillSettings(**settings))


def test_an_unwanted_answer_is_not_what_a_teacher_is_asked_about() -> None:
    row = {"prompt": "a loom ", "completion": "weaves cloth", "label": True}
    assert Distill(DistillSettings()).sample(row, ToyTokenizer(), 100).targets
    with pytest.raises(ValueError, match="is an unwanted answer"):
        Distill(DistillSettings()).sample({**row, "label": False}, ToyTokenizer(), 100)


def test_its_samples_are_those_of_supervised_fine_tuning_whatever_the_divergence() -> None:
    assert Distill(DistillSettings(beta=0.1)).fingerprint() == Distill(DistillSettings(temperature=2.0)).fingerprint()
    assert Distill(DistillSettings()).fingerprint() != Distill(DistillSettings(train_on="all")).fingerprint()


@pytest.fixture(scope="module")
def recorded() -> Callable[[str], dict]:
    if not (SHARED / "gkd.json").is_file():
        pytest.skip(f"no recorded references in {SHARED}")
    return lambda name: json.loads((SHARED / f"{name}.json").read_text())


def model(name: str) -> LlamaForCausalLM:
    config = json.loads((SHARED / "tiny_llama_config.json").read_text())
    config.pop("architecture")
    module = LlamaForCausalLM(LlamaConfig(**config))
    module.load_state_dict(load_file(SHARED / f"tiny_{name}.safetensors"))
    return module


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_loss_and_gradients_are_those_recorded(recorded: Callable[[str], dict], beta: float) -> None:
    case = next(case for case in recorded("gkd")["cases"] if case["beta"] == beta)
    policy, settings = model("policy"), {key: case[key] for key in ("beta", "temperature")} | {"lmbda": 0.0}
    found = loss_of("distill", settings, recorded("sft")["batch"], policy, roles={"teacher": model("reference")})
    assert found.loss == pytest.approx(case["loss"], rel=1e-4)
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(case["grad_l2"], rel=1e-3)
    assert found.metrics["kl"] == pytest.approx(recorded("gkd")["cases"][0]["loss"], rel=1e-4)


def test_recorded_logits_give_the_recorded_divergences(recorded: Callable[[str], dict]) -> None:
    small = recorded("gkd")["small"]
    policy, teacher = (torch.tensor(small[f"{who}_logits"]) for who in ("student", "teacher"))
    learned = torch.tensor(small["labels"]) != -100
    for name, expected in small["loss"].items():
        beta, temperature = (float(part[number:]) for part, number in zip(name.split("_"), (4, 1), strict=True))
        found = divergence(policy[learned], teacher[learned], beta, temperature).mean()
        assert found.item() == pytest.approx(expected, rel=1e-4), name
