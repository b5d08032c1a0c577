"""Online DPO: which completions make a pair, and that a pair is learned from as `objective=dpo` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import Answer, Batch, Completion, Drawn, Reward, Rollout, Sample
from loomtune.errors import UserError
from loomtune.run import Run
from loomtune.testing import check_objective, toy
from loomtune.toolkit import log_probs
from loomtune_plugins.objectives.dpo import Dpo
from loomtune_plugins.objectives.dpo_settings import DpoSettings
from loomtune_plugins.objectives.online.invariants import FRESH, LATER, Disagreement
from loomtune_plugins.objectives.online.online_dpo import OnlineDpo
from loomtune_plugins.objectives.online.online_dpo_settings import OnlineDpoSettings
from loomtune_plugins.objectives.online.telling import EMPTY_BATCHES, NoReward, NoSpread

EOS = toy.ToyTokenizer.eos_id
A, B, C = (toy.SPECIAL + ord(letter) for letter in "abc")
ROWS = [{"prompt": "a loom "}, {"prompt": "warp "}]
WRITTEN: tuple[list[int], ...] = ([A, EOS], [B, B, EOS], [C, A, EOS], [B, EOS])


class Scripted(Rollout):
    """Completes with what it is told to, in turn."""

    def __init__(self, *completions: Sequence[int], log_prob: float | None = None) -> None:
        self.completions, self.log_prob = completions or WRITTEN, log_prob

    def generate(self, role: Any, prompts: Any, keys: Any, sampling: Any, world: Any) -> list[Completion]:
        made = [list(self.completions[i % len(self.completions)]) for i in range(len(prompts))]
        said = [[] if self.log_prob is None else [self.log_prob] * len(tokens) for tokens in made]
        return [Completion(tokens, log_probs) for tokens, log_probs in zip(made, said, strict=True)]


class Worth(Reward):
    """What a function says of an answer."""

    def __init__(self, worth: Callable[[Answer], float]) -> None:
        self.worth = worth

    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        return [self.worth(one) for one in answers]


class Heard:
    """Keeps what is told of rollouts."""

    told: Sequence[Mapping[str, Any]] = ()

    def tell(self, event: str, **arguments: Any) -> None:
        self.told = arguments["samples"]


def letters(answer: Answer) -> float:
    """The more of `a` the better, the more of `b` the worse."""
    return answer.text.count("a") - answer.text.count("b")


def losses(*names: str, **settings: Any) -> dict[str, Any]:
    return {name: installed().build("loss", name, settings) for name in names}


def objective(worth: Any = letters, loss: str = "sigmoid", **settings: Any) -> OnlineDpo:
    made = OnlineDpo(OnlineDpoSettings(**{"group": 4, "max_new_tokens": 8, **settings}))
    made.use(losses(loss), {"worth": Worth(worth)})
    return made


def run_of(made: OnlineDpo, rollout: Rollout | None = None) -> Run:
    run = toy.run(Path(), {})
    run.objective, run.rollout, run.roles = made, rollout or Scripted(), toy.roles(made)
    run.events = Heard()  # type: ignore[assignment]
    return run


def steps_of(run: Run) -> list[list[Sample]]:
    own = [run.objective.sample(row, toy.ToyTokenizer(), run.max_length) for row in ROWS]
    drawn = [Drawn(i, sample, row, i) for i, (sample, row) in enumerate(zip(own, ROWS, strict=True))]
    return [list(step) for step in run.objective.experience(run, drawn)]


def texts(sample: Sample) -> list[str]:
    return [toy.ToyTokenizer().decode(segment.tokens.tolist()) for segment in sample.segments]


@pytest.mark.parametrize("settings", [{}, {"epochs": 2, "minibatches": 2}, {"temperature": 0.7}])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "kl"])
def test_it_keeps_the_contract(settings: dict[str, Any], loss: str) -> None:
    if loss == "kl" and "temperature" in settings:
        pytest.skip("loss=kl compares whole distributions, of no temperature")
    check_objective(OnlineDpo(OnlineDpoSettings(**settings)), ROWS, losses=losses(loss))


def test_the_best_completion_is_preferred_to_the_worst_of_its_prompt() -> None:
    (step,) = steps_of(run_of(objective()))
    assert sorted(texts(sample) for sample in step) == [["a loom ", "a", "bb"], ["warp ", "a", "bb"]]
    assert [segment.parent for segment in step[0].segments] == [-1, 0, 0]
    assert [bool(segment.is_target.all()) for segment in step[0].segments] == [False, True, True]
    assert [sample.numbers["first"] for sample in step] == [FRESH, FRESH]


def test_equal_rewards_make_no_pair_nor_does_what_is_lost_empty_or_cut() -> None:
    worth = iter([math.nan, 1.0, 0.0, 5.0, 2.0, 2.0, 2.0, 2.0])
    made = objective(lambda _: next(worth), mask_truncated=True)
    run = run_of(made, Scripted([A, EOS], [B, B, EOS], [C, A, EOS], [B]))
    ((sample,),) = steps_of(run)
    assert texts(sample) == ["a loom ", "bb", "ca"]
    assert run.noted["pairs/share"] == 0.5 and run.noted["pairs/margin"] == 1.0


def test_a_pair_is_as_far_apart_as_is_asked() -> None:
    assert len(steps_of(run_of(objective(margin=2.9)))[0]) == 2
    assert not steps_of(run_of(objective(margin=3.0)))


def test_observers_hear_of_all_completions_and_which_side_each_is_on() -> None:
    run = run_of(objective())
    steps_of(run)
    told = run.events.told  # type: ignore[attr-defined]
    assert [(row["completion"], row["advantage"]) for row in told[:4]] == [("a", 1), ("bb", -1), ("ca", 0), ("b", 0)]
    assert run.noted["rewards/worth"] == pytest.approx((1 - 2 + 1 - 1) / 4) and "advantages/std" not in run.noted


def test_where_nothing_is_better_other_prompts_are_drawn_for_a_while() -> None:
    run = run_of(objective(lambda _: 1.0))
    assert [steps_of(run) for _ in range(EMPTY_BATCHES - 1)] == [[]] * (EMPTY_BATCHES - 1)
    with pytest.raises(NoSpread, match=r"no completion was better"):
        steps_of(run)
    lost = run_of(objective(lambda _: math.nan))
    with pytest.raises(NoReward):
        for _ in range(EMPTY_BATCHES):
            assert steps_of(lost) == []


def test_what_is_noted_is_of_the_batch_that_is_learned_from() -> None:
    worth = iter([7.0] * 8 + [0.0, 1.0, 0.0, 1.0] * 2)
    run = run_of(objective(lambda _: next(worth)))
    assert steps_of(run) == [] and len(steps_of(run)) == 1
    assert (run.noted["rewards/mean"], run.noted["groups/equal"], run.noted["pairs/share"]) == (0.5, 0.0, 1.0)


def test_epochs_and_minibatches_go_through_the_pairs() -> None:
    steps = steps_of(run_of(objective(epochs=2, minibatches=2)))
    assert [len(step) for step in steps] == [1, 1, 1, 1]
    assert [step[0].numbers["first"] for step in steps] == [FRESH, LATER, LATER, LATER]
    assert sorted(texts(step[0])[0] for step in steps) == ["a loom ", "a loom ", "warp ", "warp "]
    assert {name for step in steps for name in step[0].segments[1].columns} == {"reference"}


def step_of(run: Run) -> tuple[Batch, Any]:
    """The micro-batch of the first step, and what goes along with it."""
    samples = steps_of(run)[0]
    batch = collate(samples, range(len(samples)), 0)
    return batch, run.objective.statistics(run.roles, [batch], run.world)


def moved(run: Run) -> None:
    """A policy that is not its reference any more."""
    with torch.no_grad():
        for parameter in run.policy.engine.network.parameters():  # type: ignore[attr-defined]
            parameter.mul_(1.25)


def sides(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """`(pairs,)` each: sums over the tokens of the chosen and of the rejected answers, pair by pair."""
    sums: dict[tuple[int, int], Tensor] = {}
    for target, row in enumerate(batch.row.tolist()):
        key = int(batch.sample_of_segment[row]), int(batch.part[row])
        sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64)) + values[target].double()
    pairs = sorted({sample for sample, _ in sums})
    return torch.stack([sums[pair, 1] for pair in pairs]), torch.stack([sums[pair, 2] for pair in pairs])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_the_loss_is_the_formula_of_the_policy_that_drew(loss: str, temperature: float) -> None:
    run = run_of(objective(loss=loss, temperature=temperature, beta=0.3))
    batch, statistics = step_of(run)
    moved(run)
    statistics["watch"].first = LATER
    found = run.objective.loss(run.roles, batch, {loss: 2.0}, statistics).terms[loss]

    def ratio(role: str) -> Tensor:
        return log_probs(run.roles[role], batch, temperature=temperature)

    chosen, rejected = sides(ratio("policy") - ratio("reference"), batch)
    gap, lengths = chosen - rejected, torch.tensor([2.0, 3.0])
    expected = {
        "sigmoid": -torch.log(torch.sigmoid(0.3 * gap)),
        "ipo": (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * 0.3)) ** 2,
        "hinge": torch.relu(1 - 0.3 * gap),
    }[loss].sum()
    assert gap.abs().max() > 0.01
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
    found.backward()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "robust", "bco_pair", "kl"])
@pytest.mark.parametrize("settings", [{}, {"divergence": "forward_kl"}, {"tail": 0.5}, {"weighting": True}])
def test_a_pair_is_learned_from_as_objective_dpo_does(loss: str, settings: dict[str, Any]) -> None:
    known = {"ipo": {"tail"}, "bco_pair": {"divergence"}, "kl": {"divergence", "tail", "weighting"}}.get(loss, set())
    if known & settings.keys():
        pytest.skip(f"loss={loss} takes no {known & settings.keys()}")
    run = run_of(objective(loss=loss, **settings))
    batch, statistics = step_of(run)
    moved(run)
    statistics["watch"].first = LATER
    offline = Dpo(DpoSettings(reference="live", **settings))
    offline.use(losses(loss), {})
    both = []
    for made, seen in ((run.objective, statistics), (offline, offline.statistics(run.roles, [batch], run.world))):
        found = made.loss(run.roles, batch, made.weights(batch), seen)
        run.policy.engine.network.zero_grad()  # type: ignore[attr-defined]
        found.terms[loss].backward()
        gradients = [p.grad.clone() for p in run.policy.engine.network.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        both.append((found, gradients))
    (online, ours), (plain, theirs) = both
    assert float(online.terms[loss].detach()) == pytest.approx(float(plain.terms[loss].detach()), rel=1e-5)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in zip(ours, theirs, strict=True))
    for name, (total, weight) in plain.metrics.items():
        assert float(online.metrics[name][0]) == pytest.approx(float(total), rel=1e-4, abs=1e-5), name
        assert float(online.metrics[name][1]) == float(weight)
    assert "entropy" in online.metrics


def test_a_fresh_policy_is_its_reference_and_says_what_was_drawn() -> None:
    run = run_of(objective())
    batch, statistics = step_of(run)
    found = run.objective.loss(run.roles, batch, {"sigmoid": 2.0}, statistics)
    assert float(found.metrics["kl"][0]) == 0 and not any(name.startswith("ratio/") for name in found.metrics)
    batch, statistics = step_of(run)
    moved(run)
    with pytest.raises(Disagreement, match="the KL to the reference is not 0"):
        run.objective.loss(run.roles, batch, {"sigmoid": 2.0}, statistics)
    drifting = run_of(objective(), Scripted(log_prob=-0.1))
    batch, statistics = step_of(drifting)
    with pytest.raises(Disagreement, match="rollout and training disagree"):
        drifting.objective.loss(drifting.roles, batch, {"sigmoid": 2.0}, statistics)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"group": 1}, r"objective\.group=1 leaves nothing to prefer"),
        ({"margin": -1.0}, r"objective\.margin=-1"),
        ({"beta": 0.0}, r"objective\.beta=0"),
        ({"temperature": 0.0}, r"objective\.temperature=0 draws nothing"),
        ({"divergence": "reverse"}, r"objective\.divergence=reverse"),
        ({"loss": "kl", "temperature": 0.5}, r"loss=kl compares whole distributions"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        objective(**settings)


def test_without_a_loss_or_a_reward_nothing_is_compared() -> None:
    for chosen, rewards, told in (({}, {"w": Worth(letters)}, "no loss"), (losses("sigmoid"), {}, "no reward")):
        with pytest.raises(UserError, match=told):
            OnlineDpo(OnlineDpoSettings()).use(chosen, rewards)
