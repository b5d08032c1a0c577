"""Each variant of GRPO, and RLOO, against its formula written once more, completion by completion, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loomtune.batching import collate
from loomtune.contracts import Batch, Objective, Role, Sample, Segment
from loomtune.errors import UserError
from loomtune.testing import toy
from loomtune.testing.recorded import built
from loomtune.toolkit import log_probs
from loomtune_plugins.objectives.online import credit

LENGTHS = (3, 5, 1, 4)
ADVANTAGES = (1.2, -0.7, 0.4, -0.9)


def sample(prompt: str, seed: int, *, completions: int = 2) -> Sample:
    """A prompt and its completions, whose older and reference log-probabilities are drawn around the policy's own."""
    rng = np.random.default_rng(seed)
    before = np.array(toy.ToyTokenizer().encode(prompt), np.int32)
    parts = [Segment(before, np.zeros(len(before), np.bool_), columns=columns(rng, 0, 0.0))]
    for i in range(completions):
        place = 2 * (seed % 2) + i
        tokens = toy.SPECIAL + rng.integers(97, 123, LENGTHS[place]).astype(np.int32)
        made = columns(rng, len(tokens), ADVANTAGES[place])
        parts.append(Segment(tokens, np.ones(len(tokens), np.bool_), 0, made))
    tokens_of = sum(len(part.tokens) for part in parts[1:])
    return Sample(tuple(parts), {"sequences": float(completions), "tokens": float(tokens_of), "first": 0.0})


def columns(rng: np.random.Generator, count: int, advantage: float) -> dict[str, Any]:
    near = {name: (-5.6 + 0.6 * rng.standard_normal(count)).astype(np.float32) for name in ("old", "reference")}
    return {**near, "advantage": np.full(count, advantage, np.float32)}


BATCH: list[Sample] = [sample("a loom ", 2), sample("warp", 3)]


def batch_of(*, unfolded: bool = False) -> Batch:
    return collate([each.unfolded() if unfolded else each for each in BATCH], range(len(BATCH)), 0)


def answers(roles: dict[str, Role], batch: Batch) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Of each completion: log-probabilities with gradient, the older ones, the reference's, and the advantage."""
    policy = log_probs(roles["policy"], batch).double()
    found = []
    for row in sorted(set(batch.row.tolist())):
        here = batch.row == row
        old, reference, advantage = (batch.columns[name][here].double() for name in ("old", "reference", "advantage"))
        found.append((policy[here], old, reference, float(advantage[0])))
    return found


def clip(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    bounded = torch.stack([ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage])
    return -bounded.min(0).values


def kl3(p: Tensor, ref: Tensor) -> Tensor:
    return (ref - p).exp() - (ref - p) - 1


Formula = Callable[[list[tuple[Tensor, Tensor, Tensor, float]]], Tensor]


def by_sequence(token: Callable[..., Tensor]) -> Formula:
    return lambda rows: torch.stack([token(*row).mean() for row in rows]).mean()


def by_token(token: Callable[..., Tensor]) -> Formula:
    return lambda rows: torch.cat([token(*row).expand(len(row[0])) for row in rows]).mean()


def vespo(p: Tensor, old: Tensor, ref: Tensor, a: float) -> Tensor:
    k, rate = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
    w = math.exp(float((p - old).sum().detach()))
    return -(math.e**rate * w**k * math.exp(-rate * w)) * a * p


FORMULAS: dict[str, tuple[dict[str, Any], Formula]] = {
    "grpo": ({}, by_sequence(lambda p, old, ref, a: clip((p - old).exp(), a, 0.2, 0.2))),
    "grpo, both bounds": (
        {"clip_low": 0.1, "clip_high": 0.3},
        by_sequence(lambda p, old, ref, a: clip((p - old).exp(), a, 0.1, 0.3)),
    ),
    "grpo, a ceiling": (
        {"clip_ceiling": 1.3},
        by_sequence(
            lambda p, old, ref, a: (
                -torch.minimum((p - old).exp().clamp(max=1.3) * a, (p - old).exp().clamp(0.8, 1.2) * a)
            )
        ),
    ),
    "bnpo": ({"variant": "bnpo"}, by_token(lambda p, old, ref, a: clip((p - old).exp(), a, 0.2, 0.2))),
    "dapo clips higher above": (
        {"variant": "dapo"},
        by_token(lambda p, old, ref, a: clip((p - old).exp(), a, 0.2, 0.28)),
    ),
    "dr_grpo divides by the longest": (
        {"variant": "dr_grpo", "max_new_tokens": 9},
        lambda rows: torch.cat([clip((p - old).exp(), a, 0.2, 0.2) for p, old, _, a in rows]).sum() / (9 * len(rows)),
    ),
    "gspo": (
        {"variant": "gspo", "clip_low": 0.2, "clip_high": 0.3},
        by_sequence(lambda p, old, ref, a: clip((p - old).mean().exp(), a, 0.2, 0.3)),
    ),
    "ratios of sequences, by token": (
        {"variant": "bnpo", "level": "sequence"},
        by_token(lambda p, old, ref, a: clip((p - old).mean().exp(), a, 0.2, 0.2)),
    ),
    "cispo": (
        {"variant": "cispo", "clip_high": 0.3},
        by_token(lambda p, old, ref, a: -(p - old).exp().detach().clamp(max=1.3) * a * p),
    ),
    "sapo": (
        {"variant": "sapo", "sapo_temperature_neg": 1.4},
        by_sequence(
            lambda p, old, ref, a: -a * torch.sigmoid((t := 1.0 if a > 0 else 1.4) * ((p - old).exp() - 1)) * 4 / t
        ),
    ),
    "vespo": ({"variant": "vespo"}, by_token(vespo)),
    "k3 weighed by the ratio": (
        {"beta": 0.3},
        by_sequence(lambda p, old, ref, a: clip((p - old).exp(), a, 0.2, 0.2) + 0.3 * (p - old).exp() * kl3(p, ref)),
    ),
    "k3 as it is": (
        {"beta": 0.3, "kl_correction": False},
        by_sequence(lambda p, old, ref, a: clip((p - old).exp(), a, 0.2, 0.2) + 0.3 * kl3(p, ref)),
    ),
    "k2": (
        {"beta": 0.3, "kl": "k2", "kl_correction": False, "variant": "dapo"},
        by_token(lambda p, old, ref, a: clip((p - old).exp(), a, 0.2, 0.28) + 0.15 * (ref - p) ** 2),
    ),
    "k1 weighed by the ratio": (
        {"beta": 0.3, "kl": "k1"},
        by_sequence(lambda p, old, ref, a: clip((p - old).exp(), a, 0.2, 0.2) + 0.3 * (p - old).exp() * (p - ref)),
    ),
}
RLOO: dict[str, tuple[dict[str, Any], Formula]] = {
    "rloo": (
        {"beta": 0.0},
        lambda rows: torch.stack([clip((p - old).sum().exp(), a, 0.2, 0.2) for p, old, _, a in rows]).mean(),
    ),
    "rloo, both bounds": (
        {"beta": 0.0, "clip_low": 0.5, "clip_high": 0.9},
        lambda rows: torch.stack([clip((p - old).sum().exp(), a, 0.5, 0.9) for p, old, _, a in rows]).mean(),
    ),
}


def network(role: Role) -> torch.nn.Module:
    found: torch.nn.Module = role.engine.network  # type: ignore[attr-defined]
    return found


def taught(value: Tensor, role: Role) -> list[Tensor]:
    value.backward()  # type: ignore[no-untyped-call]
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network(role).parameters()]
    network(role).zero_grad()
    return found


def loss(objective: Objective, roles: dict[str, Role], batch: Batch) -> tuple[Tensor, dict[str, float]]:
    totals = objective.weights(batch)
    with torch.no_grad():
        statistics = objective.statistics(roles, [batch], toy.world())
    sums = objective.loss(roles, batch, totals, statistics)
    return sums.terms["policy"] / totals["policy"], {k: float(v / w) for k, (v, w) in sums.metrics.items() if w}


@pytest.mark.parametrize("unfolded", [False, True], ids=["shared prompts", "a prompt each"])
@pytest.mark.parametrize(
    ("name", "settings", "formula"),
    [*(("grpo", *each) for each in FORMULAS.values()), *(("rloo", *each) for each in RLOO.values())],
    ids=[*FORMULAS, *RLOO],
)
def test_a_variant_is_its_formula(name: str, settings: dict[str, Any], formula: Formula, unfolded: bool) -> None:
    objective = built(name, settings)
    roles, batch = toy.roles(objective), batch_of(unfolded=unfolded)
    found, _ = loss(objective, roles, batch)
    expected = formula(answers(roles, batch))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for mine, theirs in zip(taught(found, roles["policy"]), taught(expected, roles["policy"]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=1e-6)


def test_ratios_reach_beyond_every_bound_here() -> None:
    """Else the formulas would agree though nothing is clipped."""
    objective = built("grpo", {})
    rows = answers(toy.roles(objective), batch_of())
    ratios = torch.cat([(p - old).exp() * np.sign(a) for p, old, _, a in rows]).tolist()
    assert any(r > 1.3 for r in ratios) and any(0 < r < 0.8 for r in ratios)
    assert any(r < -1.3 for r in ratios) and any(-0.8 < r < 0 for r in ratios)


def test_clip_shares_ratios_and_the_kl_are_logged_as_means_over_tokens() -> None:
    objective = built("grpo", {"beta": 0.1})
    roles, batch = toy.roles(objective), batch_of()
    rows = answers(roles, batch)
    _, metrics = loss(objective, roles, batch)
    ratios = torch.cat([(p - old).exp().detach() for p, old, _, _ in rows])
    gains = torch.cat([torch.full_like(p, a) for p, _, _, a in rows]).detach()
    assert metrics["clip/low"] == pytest.approx(float(((ratios < 0.8) & (gains < 0)).double().mean()))
    assert metrics["clip/high"] == pytest.approx(float(((ratios > 1.2) & (gains > 0)).double().mean()))
    assert metrics["ratio/mean"] == pytest.approx(float(ratios.mean()), rel=1e-5)
    assert metrics["ratio/max"] == pytest.approx(float(ratios.max()), rel=1e-5)
    assert metrics["ratio/min"] == pytest.approx(float(ratios.min()), rel=1e-5)
    assert metrics["kl"] == pytest.approx(float(torch.cat([kl3(p, ref) for p, _, ref, _ in rows]).mean()), rel=1e-5)
    assert metrics["entropy"] > 1


def test_log_probabilities_and_the_entropy_are_those_of_sampling() -> None:
    cold, batch = built("grpo", {"temperature": 0.5}), batch_of()
    roles = toy.roles(cold)
    policy = log_probs(roles["policy"], batch, temperature=0.5).double()
    found, metrics = loss(cold, roles, batch)
    ratios = (policy - batch.columns["old"].double()).exp()
    each = [
        clip(ratios[batch.row == row], float(batch.columns["advantage"][batch.row == row][0]), 0.2, 0.2).mean()
        for row in sorted(set(batch.row.tolist()))
    ]
    assert float(found) == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)
    assert metrics["entropy"] < loss(built("grpo", {}), roles, batch)[1]["entropy"]


# Advantages


def spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


GROUPS = [[1.0, 0.0, 0.5], [2.0, 2.0, 2.0], [0.3], [-1.0, 4.0]]


@pytest.mark.parametrize("divisor", ["group", "batch", "none"])
def test_advantages_are_rewards_less_their_groups_mean_over_a_spread(divisor: str) -> None:
    found = credit.grouped([np.array(group) for group in GROUPS], divisor)
    for group, gains in zip(GROUPS, found, strict=True):
        over = {
            "group": spread(group) + 1e-4 if len(group) > 1 else 1.0,
            "batch": spread([value for each in GROUPS for value in each]) + 1e-4,
            "none": 1.0,
        }[divisor]
        assert gains.tolist() == pytest.approx([(value - sum(group) / len(group)) / over for value in group])


def test_equal_rewards_give_zeros_to_the_bit_and_so_does_one_alone() -> None:
    odd = [np.array([0.1] * 7), np.array([0.1])]
    assert all((gains == 0).all() for gains in (*credit.grouped(odd, "group"), *credit.left_out(odd)))


def test_a_baseline_is_the_mean_of_the_others() -> None:
    for group, gains in zip(GROUPS, credit.left_out([np.array(group) for group in GROUPS]), strict=True):
        others = [[value for j, value in enumerate(group) if j != i] for i in range(len(group))]
        expected = [value - sum(rest) / len(rest) if rest else 0.0 for value, rest in zip(group, others, strict=True)]
        assert gains.tolist() == pytest.approx(expected)


def test_dr_grpo_divides_by_nothing_unless_it_is_told_to() -> None:
    assert built("grpo", {"variant": "dr_grpo"}).settings.divisor == "none"
    assert built("grpo", {"variant": "dr_grpo", "scale": "group"}).settings.divisor == "group"
    assert built("grpo", {}).settings.divisor == "group"


# Settings

BAD = [
    ({"variant": "grp"}, "objective.variant=grp is not known. Did you mean 'grpo'?"),
    ({"group": 1}, "objective.group=1 leaves nothing to compare"),
    ({"group": 0}, "objective.group=0 is less than 1"),
    ({"temperature": 0.0}, "objective.temperature=0 draws nothing"),
    ({"top_p": 0.0}, "objective.top_p=0 is no share"),
    ({"top_k": -1}, "objective.top_k=-1 is negative"),
    ({"epochs": 0}, "objective.epochs=0 is less than 1"),
    ({"minibatches": 0}, "objective.minibatches=0 is less than 1"),
    ({"beta": -0.1}, "objective.beta=-0.1 drives the policy away"),
    ({"kl": "k4", "beta": 0.1}, "objective.kl=k4 is not known"),
    ({"kl": "k2"}, "objective.kl=k2 has no effect with objective.beta=0"),
    ({"kl_correction": False}, "objective.kl_correction=false has no effect with objective.beta=0"),
    ({"kl": "k1", "kl_correction": False, "beta": 0.1}, "a gradient that is 0 in the mean"),
    ({"clip_low": 1.5}, "objective.clip_low=1.5 is no distance"),
    ({"clip_high": -0.1}, "objective.clip_high=-0.1 is negative"),
    ({"clip_ceiling": 1.1}, "objective.clip_ceiling=1.1 is within what objective.clip_high=0.2 lets pass"),
    ({"variant": "cispo", "clip_low": 0.1}, "objective.clip_low=0.1 has no effect with objective.variant=cispo"),
    ({"variant": "sapo", "clip_high": 0.1}, "objective.clip_high=0.1 has no effect with objective.variant=sapo"),
    ({"variant": "vespo", "level": "sequence"}, "objective.level=sequence has no effect with objective.variant=vespo"),
    ({"variant": "gspo", "level": "token"}, "objective.level=token is what objective.variant=gspo is not"),
    ({"sapo_temperature_neg": 2.0}, "objective.sapo_temperature_neg=2.0 has no effect with objective.variant=grpo"),
    ({"variant": "sapo", "sapo_temperature_pos": 0.0}, "objective.sapo_temperature_pos=0 is not above 0"),
    ({"vespo_k_pos": 1.0}, "objective.vespo_k_pos=1.0 has no effect with objective.variant=grpo"),
    ({"scale": "std"}, "objective.scale=std is not known"),
    ({"dynamic": 0}, "objective.dynamic=0 draws no prompts"),
    ({"bos": "sometimes"}, "objective.bos=sometimes is not known"),
]
BAD_RLOO = [
    ({"group": 1}, "objective.group=1 leaves no other completion out"),
    ({"clip_low": -1.0}, "objective.clip_low=-1 is no distance"),
    ({"clip_high": -1.0}, "objective.clip_high=-1 is negative"),
    ({"beta": -1.0}, "objective.beta=-1 drives the policy away"),
    ({"temperature": -1.0}, "objective.temperature=-1 draws nothing"),
]


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [*(("grpo", *each) for each in BAD), *(("rloo", *each) for each in BAD_RLOO)],
    ids=lambda value: "" if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_what_makes_no_sense_or_has_no_effect_is_refused(name: str, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError) as refused:
        built(name, settings)
    (fault,) = refused.value.faults
    assert what in fault.what and "objective." in fault.cure


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError) as refused:
        built("grpo", {"group": 1, "temperature": 0.0, "beta": -1.0})
    assert len(refused.value.faults) == 3


@pytest.mark.parametrize(
    ("settings", "clip"),
    [
        ({}, (0.2, 0.2)),
        ({"clip_low": 0.1}, (0.1, 0.1)),
        ({"clip_high": 0.3}, (0.2, 0.3)),
        ({"variant": "dapo"}, (0.2, 0.28)),
        ({"variant": "dapo", "clip_low": 0.1}, (0.1, 0.28)),
        ({"variant": "gspo"}, (3e-4, 4e-4)),
        ({"variant": "cispo"}, (1.0, 4.0)),
    ],
)
def test_bounds_that_are_not_said_are_those_of_the_variants_authors(
    settings: dict[str, Any], clip: tuple[float, float]
) -> None:
    made: Any = built("grpo", settings)
    assert made.settings.clip == clip
