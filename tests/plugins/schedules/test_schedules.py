"""Schedules: the field's curves, without a void step."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from loomtune.contracts import Schedule
from loomtune.errors import UserError
from loomtune_plugins.schedules import schedules
from loomtune_plugins.schedules.constant import Constant
from loomtune_plugins.schedules.cosine import Cosine
from loomtune_plugins.schedules.linear import Linear
from loomtune_plugins.schedules.settings import ConstantSettings, CosineSettings, LinearSettings

STEPS = 40


def theirs(maker, warm: int, total: int, count: int) -> list[float]:
    """transformers' factors at current_step 0, 1, ..., count - 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = maker(optimizer, warm, total)
    factors = []
    for _ in range(count):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


def ours(schedule: Schedule, steps: int = STEPS) -> list[float]:
    return [schedule.factor(step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("schedule", "maker"),
    [
        (Cosine(CosineSettings(warmup=8)), get_cosine_schedule_with_warmup),
        (Linear(LinearSettings(warmup=8)), get_linear_schedule_with_warmup),
    ],
)
def test_a_step_has_the_factor_of_transformers_at_that_index_with_one_more_step_planned(schedule, maker) -> None:
    assert ours(schedule) == pytest.approx(theirs(maker, 8, STEPS + 1, STEPS + 1)[1:], abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "maker"),
    [
        (Cosine(CosineSettings(warmup=0)), get_cosine_schedule_with_warmup),
        (Linear(LinearSettings(warmup=0)), get_linear_schedule_with_warmup),
    ],
)
def test_without_a_warm_up_every_step_is_as_in_transformers_trainer(schedule, maker) -> None:
    assert ours(schedule) == pytest.approx(theirs(maker, 0, STEPS, STEPS), abs=1e-12)


def test_a_warm_up_below_1_is_a_share_of_the_steps() -> None:
    assert ours(Cosine(CosineSettings(warmup=0.2))) == ours(Cosine(CosineSettings(warmup=8)))


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@pytest.mark.parametrize(
    "schedule",
    [
        Cosine(CosineSettings()),
        Linear(LinearSettings()),
        Linear(LinearSettings(warmup=2)),
        Constant(ConstantSettings()),
    ],
)
def test_no_step_is_void(schedule: Schedule, steps: int) -> None:
    assert all(0 < factor <= 1 for factor in ours(schedule, steps))


def test_the_rate_never_falls_below_the_floor_and_approaches_it() -> None:
    factors = ours(Cosine(CosineSettings(warmup=0, floor=0.1)), 1000)
    assert min(factors) == factors[-1] == pytest.approx(0.1, abs=1e-4)
    assert factors[-1] > 0.1


def test_a_constant_rate_only_warms_up() -> None:
    assert ours(Constant(ConstantSettings(warmup=4)), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("settings", [CosineSettings(warmup=-1), CosineSettings(warmup=1.5), CosineSettings(floor=2.0)])
def test_senseless_settings_are_refused_with_a_cure(settings: CosineSettings) -> None:
    with pytest.raises(UserError, match="cure: set schedule"):
        Cosine(settings)


def test_the_axis_offers_all_three() -> None:
    assert [offer.name for offer in schedules()] == ["cosine", "linear", "constant"]
