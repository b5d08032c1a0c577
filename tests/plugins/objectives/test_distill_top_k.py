"""A teacher that is read once: its likeliest tokens, and all others as one more class."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins.objectives.distill import Distill
from loomtune_plugins.objectives.distill_divergence import divergence, observed
from loomtune_plugins.objectives.distill_settings import DistillSettings
from loomtune_plugins.objectives.distill_top_k import divergence_of, kept, observed_of
from runs.curves import largest
from runs.worlds import Outcome, Worlds

VOCABULARY = 11
BETAS = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])


def logits(count: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@BETAS
@pytest.mark.parametrize("k", [1, 4, 10])
def test_all_tokens_but_the_likeliest_count_together(beta: float, k: int) -> None:
    temperature = 0.7
    policy, teacher = logits(5), logits(5, 1)
    p, q = ((one.double() / temperature).softmax(-1) for one in (policy, teacher))
    ids = q.topk(k, -1).indices

    def merged(of: torch.Tensor) -> torch.Tensor:
        likeliest = of.gather(-1, ids)
        return torch.cat([likeliest, 1 - likeliest.sum(-1, keepdim=True)], -1).log()

    expected = divergence(merged(p), merged(q), beta)
    found = divergence_of(policy, kept(teacher, k, temperature), beta, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert (found <= divergence(policy, teacher, beta, temperature) + 1e-6).all()


@BETAS
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_with_the_whole_vocabulary_it_is_the_divergence_itself(beta: float, temperature: float) -> None:
    ours, theirs = logits(6, 0, 5.0).requires_grad_(), logits(6, 1, 5.0)
    found = divergence_of(ours, kept(theirs, VOCABULARY, temperature), beta, temperature)
    whole = divergence(ours, theirs, beta, temperature)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    (one,), (other,) = (torch.autograd.grad(values.sum(), ours, retain_graph=True) for values in (found, whole))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@BETAS
def test_what_is_certain_gives_numbers_and_gradients(beta: float) -> None:
    teacher = torch.zeros(2, VOCABULARY).index_fill(-1, torch.tensor([3]), 80.0)
    policy = logits(2).requires_grad_()
    value = divergence_of(policy, kept(teacher, 4, 1.0), beta, 1.0)
    value.sum().backward()
    assert value.isfinite().all() and policy.grad is not None and policy.grad.isfinite().all()


def test_the_metrics_know_no_temperature() -> None:
    policy, teacher = logits(5), logits(5, 1)
    found = observed_of(policy, kept(teacher, VOCABULARY, 0.3))
    torch.testing.assert_close(found, observed(policy, teacher), rtol=1e-5, atol=1e-6)


def test_more_tokens_than_there_are_and_tokens_that_the_policy_lacks_are_refused() -> None:
    with pytest.raises(UserError, match="top_k=12 is more than the teacher's 11 tokens"):
        kept(logits(2), 12, 1.0)
    with pytest.raises(UserError, match="the policy has 7 embeddings"):
        divergence_of(logits(2)[:, :7], kept(logits(2), VOCABULARY, 1.0), 0.5, 1.0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"teacher_logits": "kept"}, "teacher_logits=kept is not known"),
        ({"top_k": 8}, "top_k=8 has no effect"),
        ({"teacher_logits": "stored", "top_k": 0}, "top_k=0 keeps nothing"),
        ({"teacher_logits": "stored", "on_policy": 0.5}, "on_policy"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Distill(DistillSettings(**settings))


def test_more_tokens_than_the_teacher_has_are_refused_before_any_process(tiny: list[str]) -> None:
    for k, refused in ((WHOLE, False), (WHOLE + 1, True)):
        plan = api.compose([*tiny, *stored(k)])
        told = f"top_k={k} is more than the teacher's {WHOLE} tokens"
        with pytest.raises(UserError, match=told) if refused else nullcontext():
            api.check(plan)


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "packed": (1, ["sharding=single", "packing=true"]),
    "ddp on 2": (2, ["sharding=ddp"]),
    "ddp, sequence 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp", "batch.micro=2"]),
    "fsdp, tensor 2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3"]),
}
WHOLE, FEW = 259, 16


@pytest.fixture(scope="module")
def tiny(tied_model: Path, tiny_model: Path, mixed_data: Path) -> list[str]:
    models = [f"model.path={tied_model}", f"roles.teacher.model.path={tiny_model}"]
    learned = ["objective=distill", "objective.temperature=0.9", "optimizer.lr=3e-3", "steps=4"]
    data = ["data=jsonl", f"data.path={mixed_data}", "data.holdout_rows=5", "evaluator=[heldout]"]
    return [*models, *data, *learned, "tracker=[jsonl]", "checkpoint.background=false"]


@pytest.fixture
def trained(worlds: Worlds, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path / "cache"))

    def of(size: int, *settings: str, name: str) -> Outcome:
        return worlds.train(size, [*tiny, *settings], tmp_path / name)

    return of


def stored(k: int) -> list[str]:
    return ["objective.teacher_logits=stored", f"objective.top_k={k}"]


def same(one: Outcome, other: Outcome, bound: float) -> None:
    for name in ("loss", "grad_norm", "kl", "entropy"):
        assert largest(one.series(name), other.series(name)) < bound, name
    for name in ("heldout_loss", "heldout_kl"):
        assert one.result["metrics"][name] == pytest.approx(other.result["metrics"][name], rel=bound), name


def test_the_whole_vocabulary_stored_is_the_teacher_live(trained: Callable[..., Outcome]) -> None:
    alone = ["sharding=single"]
    same(trained(1, *alone, *stored(WHOLE), name="stored"), trained(1, *alone, name="live"), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_curve_in_every_layout(layout: str, trained: Callable[..., Outcome], tmp_path: Path) -> None:
    size, how = LAYOUTS[layout]
    one = trained(1, "sharding=single", *stored(FEW), name="one")
    shutil.rmtree(tmp_path / "cache" / "records")
    other = trained(size, *how, *stored(FEW), name="other")
    same(other, one, 1e-5)
    assert other.series("kl")[-1] < other.series("kl")[0]


@pytest.mark.slow
def test_a_resumed_run_makes_what_the_teacher_said_again(
    trained: Callable[..., Outcome], worlds: Worlds, tmp_path: Path
) -> None:
    how = ["sharding=fsdp", *stored(FEW)]
    whole, half = trained(2, *how, name="whole"), trained(2, *how, "stop_after=2", name="half")
    shutil.rmtree(tmp_path / "cache")
    same(worlds.resume(1, half.folder, "sharding=single"), whole, 1e-5)
