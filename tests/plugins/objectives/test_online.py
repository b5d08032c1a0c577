"""From prompts to steps: what is drawn, scored, left out and laid out, and what is said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loomtune.batching import collate
from loomtune.contracts import Answer, Completion, Drawn, Objective, Reward, RoleSpec, Rollout, Sample, Sampling
from loomtune.errors import UserError
from loomtune.run import Run
from loomtune.seeds import derive
from loomtune.testing import check_objective, toy
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives.online.grpo import Grpo
from loomtune_plugins.objectives.online.grpo_settings import GrpoSettings
from loomtune_plugins.objectives.online.invariants import FRESH, LATER
from loomtune_plugins.objectives.online.rloo import Rloo
from loomtune_plugins.objectives.online.rloo_settings import RlooSettings
from loomtune_plugins.objectives.online.telling import EMPTY_BATCHES, NoReward, NoSpread
from loomtune_plugins.objectives.sft import Sft
from loomtune_plugins.objectives.sft_settings import SftSettings

EOS = ToyTokenizer.eos_id
A, B, C = (toy.SPECIAL + ord(letter) for letter in "abc")
ROWS = [{"prompt": "a loom ", "gold": "x"}, {"prompt": "warp ", "gold": "y"}, {"prompt": "reed ", "gold": "z"}]


class Scripted(Rollout):
    """Completes with what it is told to, in turn. asked: (prompts, keys, sampling) of each call."""

    def __init__(self, *completions: Sequence[int], log_probs: Callable[[Sequence[int]], list[float]] | None = None):
        self.completions, self.log_probs = completions or ([A, EOS], [B, EOS]), log_probs
        self.asked: list[tuple[Any, Any, Sampling]] = []

    def generate(self, role: Any, prompts: Any, keys: Any, sampling: Sampling, world: Any) -> list[Completion]:
        self.asked.append((prompts, keys, sampling))
        made = [list(self.completions[i % len(self.completions)]) for i in range(len(prompts))]
        return [Completion(tokens, self.log_probs(tokens) if self.log_probs else ()) for tokens in made]


class Worth(Reward):
    """What a function says of an answer. seen: the answers of each call."""

    def __init__(self, worth: Callable[[Answer], float], weight: float = 1.0) -> None:
        self.worth, self.weight, self.seen = worth, weight, list[Sequence[Answer]]()

    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        self.seen.append(answers)
        return [self.worth(one) for one in answers]


def letters(answer: Answer) -> float:
    """1 for an answer that begins with `a`."""
    return float(answer.text.startswith("a"))


class Heard:
    """Hears what runs tell."""

    def __init__(self) -> None:
        self.rollouts: list[tuple[int, Sequence[Mapping[str, Any]]]] = []

    def tell(self, event: str, **arguments: Any) -> None:
        assert event == "rollout_finished"
        self.rollouts.append((arguments["step"], arguments["samples"]))


def grpo(worth: Any = letters, *, others: Mapping[str, Reward] | None = None, **settings: Any) -> Grpo:
    made = Grpo(GrpoSettings(**{"group": 2, "max_new_tokens": 8, **settings}))
    made.use({}, {"worth": Worth(worth), **(others or {})})
    return made


def run_of(objective: Objective, rollout: Rollout | None = None, *, max_length: int = 0) -> Run:
    run = toy.run(Path(), {})
    run.settings.max_length, run.settings.seed = max_length, 5
    run.objective, run.rollout, run.roles = objective, rollout or Scripted(), toy.roles(objective)
    run.events = Heard()  # type: ignore[assignment]
    run.draw = lambda: drawn(run, ROWS, first=100)
    return run


def drawn(run: Run, rows: Sequence[Mapping[str, Any]] = ROWS[:2], first: int = 0) -> list[Drawn]:
    own = [run.objective.sample(row, ToyTokenizer(), run.max_length) for row in rows]
    return [Drawn(i, sample, row, first + i) for i, (sample, row) in enumerate(zip(own, rows, strict=True))]


def steps_of(run: Run, rows: Sequence[Mapping[str, Any]] = ROWS[:2]) -> list[list[Sample]]:
    return [list(step) for step in run.objective.experience(run, drawn(run, rows))]


def texts(sample: Sample) -> list[str]:
    return [ToyTokenizer().decode(segment.tokens.tolist()) for segment in sample.segments]


# What is drawn


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", {"epochs": 2, "beta": 0.1}),
        ("grpo", {"variant": "dapo", "minibatches": 2}),
        ("grpo", {"variant": "cispo", "mask_truncated": True}),
        ("rloo", {"epochs": 2}),
        ("rloo", {"beta": 0.0, "normalize": True}),
    ],
)
def test_it_keeps_the_contract(name: str, settings: dict[str, Any]) -> None:
    made: Any = Grpo(GrpoSettings(**settings)) if name == "grpo" else Rloo(RlooSettings(**settings))
    check_objective(made, ROWS)


def test_a_completion_is_drawn_by_a_key_of_its_visit_and_its_place_in_the_group() -> None:
    run = run_of(grpo(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=6), engine := Scripted(), max_length=40)
    objective = run.objective
    objective.experience(run, drawn(run, first=30))
    ((prompts, keys, sampling),) = engine.asked
    before = [objective.prompt(row, ToyTokenizer()) for row in ROWS[:2]]
    assert prompts == [before[0]] * 2 + [before[1]] * 2
    assert keys == [derive(5, "rollout", visit, place) for visit in (30, 31) for place in (0, 1)]
    assert sampling == Sampling(max_tokens=6, max_length=40, temperature=0.7, top_k=5, top_p=0.9, stop=(EOS,))


def test_a_reward_sees_the_row_the_prompt_and_the_text_without_what_ends_it() -> None:
    reward = Worth(letters)
    run = run_of(grpo(others={"other": reward}), Scripted([A, B, EOS], [A, C]))
    steps_of(run, ROWS[:1])
    ((ended, cut),) = reward.seen
    assert ended == Answer(ROWS[0], run.objective.prompt(ROWS[0], ToyTokenizer()), [A, B, EOS], "ab", True)
    assert (cut.text, cut.tokens, cut.ended) == ("ac", [A, C], False)


def test_every_token_of_a_completion_is_a_target_the_end_token_too_and_none_of_the_prompt() -> None:
    run = run_of(grpo(), Scripted([A, B, EOS], [C, EOS]))
    ((sample,),) = steps_of(run, ROWS[:1])
    assert texts(sample) == ["a loom ", "ab", "c"]
    assert [segment.parent for segment in sample.segments] == [-1, 0, 0]
    assert [segment.is_target.tolist() for segment in sample.segments[1:]] == [[True] * 3, [True] * 2]
    assert not sample.segments[0].is_target.any()
    first, second = (segment.columns["advantage"] for segment in sample.segments[1:])
    assert first.tolist() == pytest.approx([2**-0.5 / (1 + 1e-4 * 2**0.5)] * 3, rel=1e-6)
    assert second.tolist() == pytest.approx([-first[0]] * 2)
    assert dict(sample.numbers) == {"sequences": 2, "tokens": 5, "first": FRESH}


def test_rewards_are_added_by_weight_and_one_of_weight_0_is_only_watched() -> None:
    lost = Worth(lambda answer: math.nan, weight=0.0)
    long = Worth(lambda answer: float(len(answer.tokens)), weight=-0.25)
    run = run_of(grpo(others={"long": long, "watched": lost}), Scripted([A, B, EOS], [C, EOS]))
    steps_of(run, ROWS[:1])
    ((step, told),) = run.events.rollouts  # type: ignore[attr-defined]
    assert step == 1 and [row["reward"] for row in told] == [1 - 0.75, -0.5]
    assert [(row["rewards"]["worth"], row["rewards"]["long"]) for row in told] == [(1.0, 3.0), (0.0, 2.0)]
    assert run.noted["rewards/long"] == 2.5 and math.isnan(run.noted["rewards/watched"])


def test_a_rollout_is_told_with_all_that_is_known_of_each_completion() -> None:
    run = run_of(grpo(), Scripted([A, EOS], [B, B]))
    run.step = 6
    run.objective.experience(run, drawn(run, ROWS[:1], first=9))
    ((step, (first, second)),) = run.events.rollouts  # type: ignore[attr-defined]
    assert step == 7
    assert first == {
        "prompt": "a loom ",
        "completion": "a",
        "reward": 1.0,
        "rewards": {"worth": 1.0},
        "advantage": pytest.approx(2**-0.5, rel=1e-3),
        "ended": True,
        "visit": 9,
        "place": 0,
    }
    assert (second["completion"], second["ended"], second["place"]) == ("bb", False, 1)


def test_the_roles_are_those_of_the_kl_and_of_rewards() -> None:
    class Reading(Worth):
        def roles(self) -> Mapping[str, RoleSpec]:
            return {"reward": RoleSpec(trained=False, head="score")}

    assert list(grpo().roles()) == ["policy"]
    assert list(grpo(beta=0.1, others={"model": Reading(letters)}).roles()) == ["policy", "reference", "reward"]


@pytest.mark.parametrize(
    ("rewards", "told"),
    [
        ({}, "no reward says what a completion is worth"),
        ({"a": Worth(letters, weight=0.0)}, "every chosen reward has the weight 0"),
    ],
)
def test_without_a_reward_that_counts_nothing_is_learned(rewards: dict[str, Reward], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Grpo(GrpoSettings()).use({}, rewards)


# Prompts


def test_a_prompt_is_the_one_that_sft_trained_on(tokenizer: Callable[..., Any]) -> None:
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four"}]
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    for made, row in (
        (tokenizer(template), {"messages": talk}),
        (tokenizer(template), {"messages": talk, "gold": 4}),
        (tokenizer(adds_bos=True), {"prompt": "How many? ", "completion": "Four"}),
        (tokenizer(pieces=True), {"prompt": "How many? ", "completion": "Four"}),
    ):
        trained = Sft(SftSettings()).sample(row, made, 100).segments[0]
        asked = grpo().prompt(row, made)
        assert trained.tokens[: int(trained.is_target.argmax())].tolist() == asked
        assert Sft(SftSettings()).prompt(row, made) == asked


def test_a_conversation_without_an_answer_and_a_prompt_of_turns_are_asked_alike(tokenizer: Callable[..., Any]) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    asked = [{"role": "user", "content": "How many?"}]
    made = tokenizer(template)
    found = [grpo().prompt(row, made) for row in ({"messages": asked}, {"prompt": asked})]
    assert found[0] == found[1] and made.decode(found[0], special=True).endswith("<|assistant|>")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "plain"}, "has no prompt and no messages"),
        ({"prompt": ""}, "has an empty prompt"),
        ({"prompt": 3}, "has no text as its prompt"),
    ],
)
def test_a_row_that_asks_nothing_is_refused_in_words(row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        grpo(bos="never").sample(row, ToyTokenizer(), 50)


def test_settings_that_change_tokens_change_the_fingerprint_and_others_do_not() -> None:
    assert grpo().fingerprint() == grpo(group=4, beta=0.1).fingerprint() == Rloo(RlooSettings()).fingerprint()
    changed: list[dict[str, Any]] = [{}, {"separator": "x"}, {"bos": "never"}, {"system": "s"}]
    assert len({grpo(**each).fingerprint() for each in changed}) == 4


# What is left out


def test_an_answer_without_a_score_is_no_member_of_its_group() -> None:
    scores = iter([1.0, math.nan, 0.0, 0.5])
    run = run_of(grpo(lambda _: next(scores), group=4), Scripted([A, EOS], [B, EOS], [C, EOS], [A, A, EOS]))
    ((sample,),) = steps_of(run, ROWS[:1])
    assert texts(sample) == ["a loom ", "a", "c"], "and the one in the middle of the others has no gradient"
    assert sample.numbers["sequences"] == 3 and sample.numbers["tokens"] == 2 + 2 + 3
    found = [float(segment.columns["advantage"][0]) for segment in sample.segments[1:]]
    assert found == pytest.approx([1 / (1 + 2e-4), -1 / (1 + 2e-4)], rel=1e-6)
    assert run.noted["rewards/lost"] == 1 and run.noted["rewards/mean"] == 0.5 and run.noted["rewards/worth"] == 0.5
    ((_, told),) = run.events.rollouts  # type: ignore[attr-defined]
    assert told[1]["reward"] is None and told[1]["advantage"] is None and told[3]["advantage"] == 0


@pytest.mark.parametrize("worth", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_no_number_is_lost(worth: float) -> None:
    run = run_of(grpo(lambda answer: worth if answer.text == "a" else 1.0))
    (step,) = steps_of(run)
    assert run.noted["rewards/lost"] == 2 and all(sample.numbers["sequences"] == 1 for sample in step)


def test_a_batch_without_any_score_makes_no_step_and_many_of_them_end_the_run() -> None:
    run = run_of(grpo(lambda _: math.nan))
    for _ in range(EMPTY_BATCHES - 1):
        assert steps_of(run) == []
    with pytest.raises(NoReward, match="8 batches of completions one after the other have no reward"):
        steps_of(run)


def test_one_batch_with_a_score_is_enough_to_go_on() -> None:
    run = run_of(grpo(lambda _: math.nan))
    for _ in range(3 * EMPTY_BATCHES):
        objective: Any = run.objective
        objective.rewards["worth"].worth = letters if objective.signs.unscored else lambda _: math.nan
        steps_of(run)


def learned(run: Run, step: Sequence[Sample]) -> tuple[float, dict[str, float]]:
    """The loss of a step and its metrics; gradients stay."""
    batch = collate(step, range(len(step)), 0)
    statistics = run.objective.statistics(run.roles, [batch], toy.world())
    totals = run.objective.weights(batch)
    sums = run.objective.loss(run.roles, batch, totals, statistics)
    loss = sums.terms["policy"] / totals["policy"]
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {
        name: float(value / weight) for name, (value, weight) in sums.metrics.items() if weight
    }


def gradient(run: Run) -> float:
    network: Any = run.policy.engine
    return float(sum(p.grad.abs().sum() for p in network.network.parameters() if p.grad is not None))


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo", "vespo"])
def test_equal_rewards_are_a_step_without_a_gradient(variant: str) -> None:
    run = run_of(grpo(lambda _: 0.1, variant=variant, dynamic=1, group=3))
    (step,) = steps_of(run)
    loss, metrics = learned(run, step)
    assert loss == 0 and gradient(run) == 0 and math.isfinite(metrics["entropy"])
    assert run.noted["groups/equal"] == 1


def test_of_completions_without_an_advantage_nothing_is_computed_and_the_loss_is_the_same() -> None:
    engine = Scripted([A, EOS], [B, EOS], [A, A], [A, C])
    run = run_of(grpo(variant="dapo", dynamic=1), engine)
    (lean,) = steps_of(run)
    ((sample,), counts) = lean, {"sequences": 4, "tokens": 8, "first": FRESH}
    assert len(sample.segments) == 3 and dict(sample.numbers) == counts, "what is left out counts in the weight"
    with_kl = run_of(grpo(variant="dapo", dynamic=1, beta=1e-12, kl="k2"), engine)
    (whole,) = steps_of(with_kl)
    assert sum(len(sample.segments) for sample in whole) == 6
    assert learned(run, lean)[0] == pytest.approx(learned(with_kl, whole)[0], abs=1e-8)
    assert gradient(run) == pytest.approx(gradient(with_kl), rel=1e-5)


def test_an_empty_completion_counts_and_is_no_crash() -> None:
    run = run_of(grpo(), Scripted([], [A, EOS], [B], []))
    (step,) = steps_of(run)
    assert [len(sample.segments) for sample in step] == [2, 2]
    loss, _ = learned(run, step)
    assert (
        math.isfinite(loss) and run.noted["completions/empty"] == 0.5 and run.noted["completions/mean_length"] == 0.75
    )


def test_a_batch_of_nothing_but_empty_completions_makes_no_step() -> None:
    assert steps_of(run_of(grpo(), Scripted([]))) == []


def test_a_prompt_that_fills_the_length_is_cut_and_leaves_no_room() -> None:
    run = run_of(grpo(), max_length=5)
    (one, _) = drawn(run)
    assert one.sample.length == 5 and run.objective.sample(ROWS[0], ToyTokenizer(), 6).length == 6


def test_cut_completions_are_masked_but_still_compared_with() -> None:
    engine = Scripted([A, EOS], [B, B], [C, EOS])
    run = run_of(grpo(group=3, mask_truncated=True), engine)
    ((sample,),) = steps_of(run, ROWS[:1])
    assert texts(sample) == ["a loom ", "a", "c"]
    assert dict(sample.numbers) == {"sequences": 3, "tokens": 4, "first": FRESH}
    whole = run_of(grpo(group=3), engine)
    ((other,),) = steps_of(whole, ROWS[:1])
    assert sample.segments[1].columns["advantage"][0] == other.segments[1].columns["advantage"][0]


def test_a_group_of_one_survivor_has_no_advantage() -> None:
    scores = iter([1.0, math.nan, 1.0, 0.0])
    run = run_of(grpo(lambda _: next(scores), group=2))
    (step,) = steps_of(run)
    assert [sample.numbers["sequences"] for sample in step] == [3] and texts(step[0])[0] == "warp "
    assert math.isfinite(learned(run, step)[0])


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


def count_passes(run: Run) -> dict[str, int]:
    """Counts the passes over each role from here on."""
    passes: dict[str, int] = {}

    def counting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            passes[name] = passes.get(name, 0) + 1
            return forward(*given, **named)

        return counted

    for name, role in run.roles.items():
        role.engine.forward = counting(name, role.engine.forward)  # type: ignore[method-assign]
    return passes


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


def rloo(**settings: Any) -> Rloo:
    made = Rloo(RlooSettings(**{"group": 2, "max_new_tokens": 8, **settings}))
    made.use({}, {"worth": Worth(letters)})
    return made


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
