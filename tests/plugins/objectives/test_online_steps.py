"""From samples to steps, with what is read before them; what gives way to other prompts; what is said of trouble."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from loomtune.batching import collate
from loomtune.contracts import Rollout
from loomtune.run import Run
from loomtune.testing import toy
from loomtune_plugins.objectives.online.invariants import FRESH, LATER
from loomtune_plugins.objectives.online.telling import NoSpread
from online_fakes import EOS, ROWS, A, B, Scripted, count_passes, drawn, grpo, letters, rloo, run_of, steps_of, texts

# Steps


def test_steps_are_epochs_of_minibatches_of_whole_groups_in_orders_of_their_own() -> None:
    rows = [{"prompt": f"row {i} "} for i in range(6)]
    run = run_of(grpo(epochs=3, minibatches=2))
    steps = steps_of(run, rows)
    assert len(steps) == run.objective.steps_per_batch() == 6 and {len(step) for step in steps} == {3}
    orders = [[texts(sample)[0] for step in steps[i : i + 2] for sample in step] for i in (0, 2, 4)]
    assert all(sorted(order) == [row["prompt"] for row in rows] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [{sample.numbers["first"] for sample in step} for step in steps] == [{FRESH}, *[{LATER}] * 5]
    again = steps_of(run_of(grpo(epochs=3, minibatches=2)), rows)
    assert [[texts(sample)[0] for sample in step] for step in again] == [[texts(s)[0] for s in step] for step in steps]


def test_prompts_that_do_not_divide_are_dealt_out_unevenly() -> None:
    run = run_of(grpo(minibatches=2))
    assert sorted(len(step) for step in steps_of(run, ROWS)) == [1, 2]


def test_a_minibatch_of_which_nothing_is_learned_is_no_step() -> None:
    run = run_of(grpo(minibatches=2), Scripted([A, EOS], [B, EOS], [], []))
    assert len(steps_of(run)) == 1


def test_one_step_of_a_batch_reads_nothing_beforehand() -> None:
    run = run_of(grpo())
    run.read = None  # type: ignore[assignment]
    ((sample, _),) = steps_of(run)
    assert set(sample.segments[1].columns) == {"advantage"}


def test_several_steps_have_what_the_policy_said_before_the_first_and_a_kl_has_the_references() -> None:
    run = run_of(grpo(epochs=2, beta=0.1, temperature=0.8))
    passes = count_passes(run)
    steps = steps_of(run)
    assert passes == {"policy": 1, "reference": 1}
    batch = collate(steps[0], range(2), 0)
    from loomtune.toolkit import log_probs

    for name, column in (("policy", "old"), ("reference", "reference")):
        expected = log_probs(run.roles[name], batch, temperature=0.8).detach()
        torch.testing.assert_close(batch.columns[column], expected, rtol=1e-5, atol=1e-5)


# Dynamic sampling


def test_prompts_whose_completions_are_worth_the_same_give_way_to_others() -> None:
    engine = Scripted([A, EOS], [A, A, EOS], [A, EOS], [B, EOS])
    run = run_of(grpo(dynamic=3), engine)
    (step,) = steps_of(run)
    assert len(step) == 2 and len(engine.asked) == 2
    assert sorted(texts(sample)[0] for sample in step) == ["warp ", "warp "]
    assert run.noted["prompts/drawn"] == 5 and run.noted["groups/equal"] == pytest.approx(3 / 5)
    assert len(run.events.rollouts) == 1  # type: ignore[attr-defined]


def test_fewer_prompts_than_asked_for_are_learned_from_where_the_bound_is_met() -> None:
    scores = iter([0.0, 0.0, 0.0, 1.0, *[1.0] * 6])
    run = run_of(grpo(lambda _: next(scores), dynamic=2))
    (step,) = steps_of(run)
    assert len(step) == 1 and run.noted["groups/equal"] == 0.8


def test_a_bound_of_batches_without_any_spread_ends_the_run_by_name() -> None:
    run = run_of(grpo(dynamic=3), engine := Scripted([A, EOS]))
    with pytest.raises(NoSpread, match="3 batches of prompts one after the other have no group"):
        steps_of(run)
    assert len(engine.asked) == 3


def test_without_it_other_prompts_are_never_drawn() -> None:
    run = run_of(grpo(), engine := Scripted([A, EOS]))
    steps_of(run)
    assert len(engine.asked) == 1
    assert grpo(variant="dapo").settings.draws == 8 and grpo(variant="dapo", dynamic=1).settings.draws == 1


# RLOO


def test_the_kl_of_a_whole_completion_is_taken_from_its_reward() -> None:
    run = run_of(rloo(beta=0.5))
    with torch.no_grad():
        for p in run.roles["reference"].engine.network.parameters():  # type: ignore[attr-defined]
            p.mul_(1.3)
    ((sample, *_),) = steps_of(run)
    columns = [segment.columns for segment in sample.segments[1:]]
    kls = [float((c["old"].astype(np.float64) - c["reference"]).sum()) for c in columns]
    first, second = 1 - 0.5 * kls[0], 0 - 0.5 * kls[1]
    found = [float(c["advantage"][0]) for c in columns]
    assert abs(kls[0]) > 1e-3 and found == pytest.approx([first - second, second - first], rel=1e-5)


def test_without_a_kl_rloo_reads_nothing_beforehand() -> None:
    run = run_of(rloo(beta=0.0))
    assert count_passes(run) == {} and len(steps_of(run)) == 1
    assert list(run.objective.roles()) == ["policy"]


# What a checkpoint keeps


def test_what_was_said_stays_said_over_a_restart() -> None:
    run = run_of(grpo(lambda _: 1.0))
    for _ in range(3):
        steps_of(run)
    state = json.loads(json.dumps(run.objective.state()))
    other = grpo()
    other.resume(state)
    assert other.signs == run.objective.signs and other.signs.said == ["equal"]  # type: ignore[attr-defined]
    other.resume({})
    assert not other.signs.said


# What is told of trouble


def said(run: Run, count: int = 3, capsys: Any = None, **metrics: float) -> str:
    for _ in range(count):
        steps_of(run)
        run.metrics |= metrics
    return str(capsys.readouterr().err)


SIGNS: list[tuple[str, Any, Rollout, dict[str, float]]] = [
    ("gets the same reward, for every prompt", lambda _: 1.0, Scripted(), {}),
    ("most completions are empty", letters, Scripted([], [], [A]), {}),
    ("all completions, whatever their prompt, are the same", letters, Scripted([A, EOS]), {}),
    ("no completion comes to an end", letters, Scripted([A], [B]), {}),
    ("more than 1 nat a token from its reference", letters, Scripted(), {"kl": 1.5}),
    ("more than 100 times as likely as when it was drawn", letters, Scripted(), {"ratio/max": 150.0}),
]


@pytest.mark.parametrize(("words", "worth", "engine", "metrics"), SIGNS, ids=[sign[0] for sign in SIGNS])
def test_trouble_is_said_once_in_plain_words(
    words: str, worth: Any, engine: Rollout, metrics: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(grpo(worth), engine)
    assert words not in said(run, 2, capsys, **metrics), "once or twice may be chance"
    assert said(run, 6, capsys, **metrics).count(words) == 1


def test_an_entropy_that_vanishes_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(grpo())
    assert "entropy" not in said(run, 5, capsys, entropy=1.0)
    assert "below a twentieth of what it was" in said(run, 4, capsys, entropy=0.04)


def test_health_is_not_talked_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(run_of(grpo()), 8, capsys, entropy=1.0, kl=0.2, **{"ratio/max": 3.0}) == ""


@pytest.mark.parametrize("made", [grpo(), rloo()], ids=["grpo", "rloo"])
def test_rows_that_are_prompts_alone_weigh_nothing(made: Any) -> None:
    run = run_of(made)
    batch = collate([one.sample for one in drawn(run)], range(2), 0)
    assert made.weights(batch) == {"policy": 0}
    with torch.no_grad():
        sums = made.loss(run.roles, batch, {"policy": 0.0}, made.statistics(run.roles, [batch], toy.world()))
    assert float(sums.terms["policy"]) == 0 and not any(float(weight) for _, weight in sums.metrics.values())
