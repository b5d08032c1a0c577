"""Every loss of pairs against the formula of its paper, in plain numbers: values, gradients, and far out.

Recorded numbers of TRL (`test_references.py`) cover one setting of some of these at ordinary log-ratios.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from loomtune.catalogue import installed
from loomtune.contracts import Loss, Pairs
from loomtune.testing import toy


@dataclass(frozen=True)
class Pair:
    """Summed log-probabilities of both answers, under the policy and the reference, and how many tokens they have."""

    chosen: float
    rejected: float
    reference_chosen: float
    reference_rejected: float
    chosen_tokens: int
    rejected_tokens: int
    beta: float = 0.1

    @property
    def c(self) -> float:
        """The log-ratio of the chosen answer."""
        return self.chosen - self.reference_chosen

    @property
    def r(self) -> float:
        return self.rejected - self.reference_rejected

    @property
    def x(self) -> float:
        """DPO's argument."""
        return self.beta * (self.c - self.r)

    @property
    def means(self) -> tuple[float, float]:
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens

    @property
    def apart(self) -> float:
        """The difference of log-ratios a token."""
        return self.c / self.chosen_tokens - self.r / self.rejected_tokens


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -700 else x


def smoothed(x: float, wrong: float) -> float:
    return -(1 - wrong) * log_sigma(x) - wrong * log_sigma(-x)


def exo(pair: Pair, wrong: float) -> float:
    """KL of (sigma(x), sigma(-x)) to (1 - wrong, wrong)."""
    return sigma(pair.x) * (log_sigma(pair.x) - math.log(1 - wrong)) + sigma(-pair.x) * (
        log_sigma(-pair.x) - math.log(wrong)
    )


def robust(pair: Pair, wrong: float) -> float:
    return ((1 - wrong) * -log_sigma(pair.x) - wrong * -log_sigma(-pair.x)) / (1 - 2 * wrong)


def discopop(pair: Pair, tau: float) -> float:
    blend = sigma(pair.x / tau) if pair.x / tau > -700 else 0.0
    return (1 - blend) * -log_sigma(pair.x) + blend * math.exp(-pair.x)


def log_odds(mean: float) -> float:
    """Of a mean log-probability a token."""
    return mean - math.log(-math.expm1(mean))


def power(mean: float, alpha: float) -> float:
    """AlphaPO's reward without beta."""
    return (1 - math.exp(mean) ** -alpha) / alpha


def simpo(pair: Pair, gamma: float, wrong: float = 0.0, alpha: float = 0.0) -> float:
    chosen, rejected = (power(mean, alpha) if alpha else mean for mean in pair.means)
    return smoothed(pair.beta * chosen - pair.beta * rejected - gamma, wrong)


Formula = Callable[[Pair], float]

VARIANTS: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "DPO (Rafailov 2023, 7)": ("sigmoid", {}, lambda p: -log_sigma(p.x)),
    "cDPO (Mitchell 2023, 3)": ("sigmoid", {"label_smoothing": 0.2}, lambda p: smoothed(p.x, 0.2)),
    "length-normalised DPO (Lambert 2024, 6)": ("sigmoid_norm", {}, lambda p: -log_sigma(p.beta * p.apart)),
    "SLiC (Zhao 2023, 1)": ("hinge", {}, lambda p: max(0.0, 1 - p.x)),
    "IPO (Azar 2023, 17)": ("ipo", {}, lambda p: (p.apart - 1 / (2 * p.beta)) ** 2),
    "EXO (Ji 2024, 16)": ("exo_pair", {}, lambda p: exo(p, 0.1)),
    "EXO, nearly sure": ("exo_pair", {"label_smoothing": 1e-3}, lambda p: exo(p, 1e-3)),
    "robust DPO (Chowdhury 2024, 12)": ("robust", {}, lambda p: robust(p, 0.1)),
    "robust DPO, very doubtful": ("robust", {"label_smoothing": 0.4}, lambda p: robust(p, 0.4)),
    "DiscoPOP (Lu 2024, 5)": ("discopop", {}, lambda p: discopop(p, 0.05)),
    "DiscoPOP, blended widely": ("discopop", {"tau": 2.0}, lambda p: discopop(p, 2.0)),
    "NCA (Chen 2024, 11)": (
        "nca_pair",
        {},
        lambda p: -log_sigma(p.beta * p.c) - (log_sigma(-p.beta * p.c) + log_sigma(-p.beta * p.r)) / 2,
    ),
    "BCO (Jung 2024, 9)": ("bco_pair", {}, lambda p: -log_sigma(p.beta * p.c) - log_sigma(-p.beta * p.r)),
    "SPPO (Wu 2024, 4.7)": (
        "sppo_hard",
        {},
        lambda p: (p.c - (1 - 0.5) / p.beta) ** 2 + (p.r - (0 - 0.5) / p.beta) ** 2,
    ),
    "APO zero (D'Oosterlinck 2024, 7)": (
        "apo_zero",
        {},
        lambda p: (1 - sigma(p.beta * p.c)) + sigma(p.beta * p.r),
    ),
    "APO down (D'Oosterlinck 2024, 8)": ("apo_down", {}, lambda p: sigma(p.beta * p.c) + (1 - sigma(p.x))),
    "SFT": ("sft", {}, lambda p: -p.chosen),
    "SimPO (Meng 2024, 6)": ("simpo", {}, lambda p: simpo(p, 0.5)),
    "SimPO, gamma 1.6, doubtful": (
        "simpo",
        {"gamma": 1.6, "label_smoothing": 0.1},
        lambda p: simpo(p, 1.6, 0.1),
    ),
    "AlphaPO (Gupta 2025, 8)": ("simpo", {"alpha": 0.25}, lambda p: simpo(p, 0.5, alpha=0.25)),
    "AlphaPO, negative": ("simpo", {"alpha": -0.5, "gamma": 0.1}, lambda p: simpo(p, 0.1, alpha=-0.5)),
    "ORPO (Hong 2024, 6 and 7)": (
        "odds_ratio",
        {},
        lambda p: -p.beta * log_sigma(log_odds(p.means[0]) - log_odds(p.means[1])),
    ),
}
"""Paper and number of the equation; loss and settings; and what it says of one pair."""


def made(name: str, settings: dict[str, Any]) -> Loss:
    built: Loss = installed().build("loss", name, settings)
    return built


def ordinary() -> list[Pair]:
    """Answers of different lengths, at several betas."""
    draw = random.Random(0)
    found = []
    for beta in (0.05, 0.1, 1.0, 2.0):
        for _ in range(4):
            lengths = draw.randint(1, 40), draw.randint(1, 40)
            levels = [-draw.uniform(0.05, 3.0) * length for length in (*lengths, *lengths)]
            found.append(Pair(*levels, *lengths, beta=beta))
    return found


def far_out() -> list[Pair]:
    """Log-ratios of 50 in either direction, answers that are nearly certain, and policies that are the reference."""
    found = []
    for beta in (0.1, 1.0):
        for up in (-50.0, 0.0, 50.0):
            for down in (-50.0, 0.0, 50.0):
                found.append(Pair(-120.0, -90.0, -120.0 - up, -90.0 - down, 60, 30, beta))
    return [*found, Pair(-1e-4, -120.0, -50.0, -70.0, 1, 2, 1.0), Pair(-150.0, -1e-4, -100.0, -50.0, 3, 1, 0.1)]


def table(pairs: list[Pair], dtype: torch.dtype = torch.float64) -> Pairs:
    """What an objective without a divergence hands over, of pairs with one beta."""
    (beta,) = {pair.beta for pair in pairs}
    columns = {
        name: torch.tensor([float(getattr(pair, name)) for pair in pairs], dtype=dtype)
        for name in (
            *("chosen", "rejected", "reference_chosen", "reference_rejected", "chosen_tokens", "rejected_tokens"),
        )
    }
    for name in ("chosen", "rejected"):
        columns[name].requires_grad_()
    zeros = torch.zeros(len(pairs), dtype=dtype)
    return Pairs(
        beta=beta,
        prompt=zeros,
        prompt_tokens=zeros,
        importance=zeros + 1,
        chosen_logits=columns["chosen"] - columns["reference_chosen"],
        rejected_logits=columns["rejected"] - columns["reference_rejected"],
        **columns,
    )


def gradients(value: torch.Tensor, pairs: Pairs) -> list[float]:
    """By the chosen and by the rejected answers' log-probabilities, one after the other."""
    found = torch.autograd.grad(value, [pairs.chosen, pairs.rejected], allow_unused=True)
    return [float(g) for each in found for g in (torch.zeros(len(pairs.chosen)) if each is None else each)]


def slope(formula: Callable[[float], float], at: float) -> float:
    """The derivative by a difference of fourth order."""
    step = 1e-3
    near = formula(at + step) - formula(at - step)
    return (8 * near - (formula(at + 2 * step) - formula(at - 2 * step))) / (12 * step)


@pytest.mark.parametrize("pairs", [ordinary(), far_out()], ids=["ordinary", "far out"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_are_those_of_the_paper(variant: str, pairs: list[Pair]) -> None:
    name, settings, formula = VARIANTS[variant]
    loss = made(name, settings)
    for pair in pairs:
        given = table([pair])
        value = loss.of(given, None)
        assert value.tolist() == pytest.approx([formula(pair)], rel=1e-6, abs=1e-12), pair
        if pair.chosen_tokens > 1 and pair.rejected_tokens > 1:  # else too near to certainty for a difference
            expected = [
                slope(lambda at, which=which, pair=pair: formula(replace(pair, **{which: at})), getattr(pair, which))
                for which in ("chosen", "rejected")
            ]
            assert gradients(value.sum(), given) == pytest.approx(expected, rel=1e-6, abs=1e-7), pair


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_overflows_in_fp32(variant: str) -> None:
    name, settings, formula = VARIANTS[variant]
    loss = made(name, settings)
    for pair in far_out():
        given = table([pair], torch.float32)
        value = loss.of(given, None)
        assert value.tolist() == pytest.approx([formula(pair)], rel=2e-5, abs=1e-6), pair
        assert all(math.isfinite(found) for found in gradients(value.sum(), given)), pair


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_policy_that_lost_an_answer_altogether_gives_numbers(variant: str) -> None:
    name, settings, _ = VARIANTS[variant]
    for up, down in ((-900.0, -1.0), (-1.0, -900.0), (-900.0, -900.0)):
        given = table([Pair(up, down, -2.0, -2.0, 3, 3, 1.0)], torch.float32)
        value = made(name, settings).of(given, None)
        assert math.isfinite(value.item()) and all(math.isfinite(found) for found in gradients(value.sum(), given))


def same_beta() -> list[Pair]:
    return [replace(pair, beta=0.3) for pair in ordinary()]


def aot(pairs: list[Pair], wrong: float) -> float:
    """Melnyk 2024, algorithm 1, paired: sorted margins of the policy beside sorted margins of the reference."""
    policy = sorted(pair.chosen - pair.rejected for pair in pairs)
    reference = sorted(pair.reference_chosen - pair.reference_rejected for pair in pairs)
    return sum(smoothed(pairs[0].beta * (one - other), wrong) for one, other in zip(policy, reference, strict=True))


def aot_unpaired(pairs: list[Pair], wrong: float) -> float:
    """Unpaired: sorted log-ratios of chosen answers beside those of rejected ones."""
    up, down = sorted(pair.c for pair in pairs), sorted(pair.r for pair in pairs)
    return sum(smoothed(pairs[0].beta * (one - other), wrong) for one, other in zip(up, down, strict=True))


@pytest.mark.parametrize("wrong", [0.0, 0.2])
@pytest.mark.parametrize(("name", "formula"), [("aot", aot), ("aot_unpaired", aot_unpaired)])
def test_orders_are_those_of_the_whole_step_in_any_micro_batches(
    name: str, formula: Callable[..., float], wrong: float
) -> None:
    pairs, loss = same_beta(), made(name, {"label_smoothing": wrong})
    step = [table(pairs[:5]), table(pairs[5:])]
    with torch.no_grad():
        statistics = loss.statistics(step, toy.world())
    values = [loss.of(part, statistics) for part in step]
    assert sum(value.sum().item() for value in values) == pytest.approx(formula(pairs, wrong), rel=1e-6)
    found = [gradients(value.sum(), part) for value, part in zip(values, step, strict=True)]
    chosen = [g for part in found for g in part[: len(part) // 2]]
    for i, gradient in enumerate(chosen):

        def moved(at: float, i: int = i) -> float:
            return formula([replace(pair, chosen=at) if j == i else pair for j, pair in enumerate(pairs)], wrong)

        assert gradient == pytest.approx(slope(moved, pairs[i].chosen), rel=1e-6, abs=1e-7)


def test_bco_splits_rewards_at_the_mean_of_the_step() -> None:
    pairs, loss = same_beta(), made("bco_pair", {"delta": "step"})
    step = [table(pairs[:5]), table(pairs[5:])]
    delta = sum(pair.beta * (pair.c + pair.r) / 2 for pair in pairs) / len(pairs)
    with torch.no_grad():
        statistics = loss.statistics(step, toy.world())
    found = [value for part in step for value in loss.of(part, statistics).tolist()]
    expected = [-log_sigma(p.beta * p.c - delta) - log_sigma(delta - p.beta * p.r) for p in pairs]
    assert found == pytest.approx(expected, rel=1e-6)


def test_every_loss_of_answers_has_a_formula_here() -> None:
    known = {name for name, _, _ in VARIANTS.values()} | {"aot", "aot_unpaired"}
    whole = {"kl"}  # of distributions: where objectives are tested
    assert known | whole == {entry.offer.name for entry in installed().entries("loss")}
