"""What has to hold before anything is learned: each is broken here, and named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loomtune.batching import collate
from loomtune.contracts import Completion, Drawn, Rollout, Sample
from loomtune.errors import LoomtuneError
from loomtune.run import Run
from loomtune.testing import toy
from loomtune.testing.experience import Letters, Writing
from loomtune.testing.toy import ToyTokenizer
from loomtune.toolkit import log_probs
from loomtune_plugins.objectives.online.grpo import Grpo
from loomtune_plugins.objectives.online.grpo_settings import GrpoSettings
from loomtune_plugins.objectives.online.invariants import BOUNDS, FIRST, FRESH, Apart, Bounds, Disagreement
from loomtune_plugins.objectives.online.watching import Watch

ROWS = [{"prompt": "a loom "}, {"prompt": "warp "}, {"prompt": "reed "}]


class Saying(Writing):
    """Says the log-probability of each token as training has it, but for a few nats. run: whose policy is asked."""

    def __init__(self, off: float = 0.0) -> None:
        self.off = off
        self.run: Run | None = None

    def generate(self, role: Any, prompts: Any, keys: Any, sampling: Any, world: Any) -> list[Completion]:
        made = super().generate(role, prompts, keys, sampling, world)
        pairs = zip(prompts, made, strict=True)
        return [replace(one, log_probs=self.said(asked, one.tokens, sampling.temperature)) for asked, one in pairs]

    def said(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> list[float]:
        from loomtune.testing.completions import answered

        assert self.run
        batch = collate([answered(prompt, tokens, {})], [0], 0)
        return [float(x) + self.off for x in log_probs(self.run.policy, batch, temperature=temperature).detach()]


def begun(rollout: Rollout | None = None, **settings: Any) -> Run:
    objective = Grpo(GrpoSettings(**{"max_new_tokens": 6, "group": 4, **settings}))
    objective.use({}, {"letters": Letters()})
    run = toy.run(Path(), {})
    run.objective, run.rollout, run.roles = objective, rollout or Writing(), toy.roles(objective)
    if isinstance(rollout, Saying):
        rollout.run = run
    return run


def steps(run: Run) -> list[list[Sample]]:
    samples = [run.objective.sample(row, ToyTokenizer(), run.max_length) for row in ROWS]
    given = [Drawn(i, sample, row, i) for i, (sample, row) in enumerate(zip(samples, ROWS, strict=True))]
    return [list(step) for step in run.objective.experience(run, given)]


def step(run: Run, samples: Sequence[Sample], micro: int = 3) -> dict[str, float]:
    """The loss over micro-batches; gives the metrics."""
    batches = [collate(samples[i : i + micro], range(i, i + micro), 0) for i in range(0, len(samples), micro)]
    statistics = run.objective.statistics(run.roles, batches, toy.world())
    sums: dict[str, list[float]] = {}
    for batch in batches:
        for name, pair in run.objective.loss(run.roles, batch, {}, statistics).metrics.items():
            sums[name] = [a + float(b) for a, b in zip(sums.get(name, [0.0, 0.0]), pair, strict=True)]
    return {name: total / weight for name, (total, weight) in sums.items() if weight}


def moved(run: Run, role: str, by: float = 1.05) -> None:
    with torch.no_grad():
        for parameter in run.roles[role].engine.network.parameters():  # type: ignore[attr-defined]
            parameter.mul_(by)


def test_what_agrees_is_passed_and_how_far_apart_it_is_is_logged() -> None:
    run = begun(Saying(1e-5), epochs=2, beta=0.1, temperature=0.7)
    found = [step(run, one, micro=2) for one in steps(run)]
    assert found[0]["rollout/apart_mean"] == pytest.approx(1e-5, rel=0.3)
    assert found[0]["ratio/max"] == pytest.approx(1, abs=1e-5) and found[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_rollout_that_disagrees_with_training_is_named() -> None:
    run = begun(Saying(0.01))
    (only,) = steps(run)
    with pytest.raises(Disagreement, match=r"(?s)rollout and training disagree: 0.01 nats.*check that the engine has"):
        step(run, only)


def test_a_rollout_by_another_temperature_is_seen() -> None:
    class Warmer(Saying):
        def said(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> list[float]:
            return super().said(prompt, tokens, 1.0)

    run = begun(Warmer(), temperature=0.7)
    with pytest.raises(Disagreement, match="rollout and training disagree"):
        step(run, steps(run)[0])


def test_it_is_seen_at_the_last_micro_batch_whichever_was_wrong() -> None:
    run = begun(Saying(0.01))
    (only,) = steps(run)
    batches = [collate([sample], [i], 0) for i, sample in enumerate(only)]
    statistics = run.objective.statistics(run.roles, batches, toy.world())
    for batch in batches[:-1]:
        run.objective.loss(run.roles, batch, {}, statistics)
    with pytest.raises(Disagreement):
        run.objective.loss(run.roles, batches[-1], {}, statistics)


def test_a_policy_that_is_read_otherwise_than_it_learns_is_named() -> None:
    run = begun(epochs=2)
    first, _ = steps(run)
    moved(run, "policy")
    with pytest.raises(Disagreement, match=r"(?s)importance ratio of the first minibatch is not 1.*adapter.dropout=0"):
        step(run, first)


def test_later_steps_of_a_batch_may_move() -> None:
    run = begun(Saying(), epochs=2)
    first, second = steps(run)
    step(run, first)
    moved(run, "policy")
    assert step(run, second)["ratio/max"] > 1.01


def test_a_reference_that_is_not_what_the_policy_began_as_is_named() -> None:
    run = begun(beta=0.1)
    moved(run, "reference")
    with pytest.raises(Disagreement, match=r"(?s)KL to the reference is not 0 before the first.*objective.beta=0"):
        step(run, steps(run)[0])


@pytest.mark.parametrize("how", ["later", "a trained adapter", "virtual tokens"])
def test_a_policy_that_is_not_fresh_may_be_away_from_its_reference(how: str) -> None:
    run = begun(beta=0.1)
    moved(run, "reference")
    if how == "later":
        run.step = 4
    elif how == "virtual tokens":
        run.virtual_tokens = 3
    else:
        run.plan = replace(run.plan, settings={**run.plan.settings, "adapter": {"name": "lora", "path": "somewhere"}})
    found = steps(run)
    assert {sample.numbers["first"] for sample in found[0]} == {FIRST}
    assert step(run, found[0])["kl"] > 1e-4


def test_all_that_does_not_hold_is_said_at_once_and_every_fault_has_a_cure() -> None:
    run = begun(Saying(0.02), beta=0.1, epochs=2)
    first = steps(run)[0]
    moved(run, "policy")
    with pytest.raises(Disagreement) as refused:
        step(run, first)
    assert isinstance(refused.value, LoomtuneError) and len(refused.value.faults) == 3
    assert all(fault.cure for fault in refused.value.faults)


def test_what_is_no_number_does_not_agree() -> None:
    run = begun(Saying(math.nan))
    with pytest.raises(Disagreement):
        step(run, steps(run)[0])


def test_bounds_go_by_the_precision_unless_the_engine_has_its_own() -> None:
    class Elsewhere(Writing):
        apart = (0.5, 5.0)

    assert Bounds.of("bf16") == Bounds(BOUNDS["bf16"], BOUNDS["bf16"])
    assert Bounds.of("fp32", Elsewhere()) == Bounds((0.5, 5.0), BOUNDS["fp32"])
    run = begun(Saying(0.01))
    run.rollout.apart = (0.02, 0.05)  # type: ignore[union-attr]
    step(run, steps(run)[0])


class Two:
    """A world of two ranks, the other of which saw something."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def gather(self, mine: Any) -> list[Any]:
        return [mine, self.other]


def test_what_another_rank_saw_counts_on_every_rank() -> None:
    run = begun(epochs=2)
    batch = collate(steps(run)[0], range(3), 0)
    said = batch.columns["old"]
    ratio = torch.ones_like(said)
    wrong = (0.5, 3.0, {"ratio": Apart(total=9.0, largest=0.2, count=20.0)})
    with pytest.raises(Disagreement, match="ratio of the first minibatch"):
        Watch(Two(wrong), 1, FRESH, Bounds()).see(said, ratio, batch)  # type: ignore[arg-type]
    fine = (0.5, 3.0, {"ratio": Apart(total=0.0, largest=0.0, count=20.0)})
    found = Watch(Two(fine), 1, FRESH, Bounds()).see(said, ratio, batch)  # type: ignore[arg-type]
    assert [float(found[name][0]) for name in ("ratio/min", "ratio/max")] == [0.5, 3.0]


def test_a_rank_without_a_sample_hears_what_the_others_saw() -> None:
    run = begun(Saying(), epochs=2)
    (first, _) = steps(run)
    empty = collate([], [], 0, first[0])
    nothing = torch.zeros(0)
    seen: tuple[float, float, dict[str, Apart]] = (0.9, 1.1, {})
    found = Watch(Two(seen), 1, FRESH, Bounds()).see(nothing, nothing, empty)  # type: ignore[arg-type]
    assert float(found["ratio/max"][0]) == pytest.approx(1.1)
