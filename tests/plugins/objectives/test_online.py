"""From prompts to samples: what is drawn, scored, left out and laid out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from loomtune.contracts import Answer, Reward, RoleSpec, Sampling
from loomtune.errors import Preempted, UserError
from loomtune.seeds import derive
from loomtune.testing import check_objective
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives.online.grpo import Grpo
from loomtune_plugins.objectives.online.grpo_settings import GrpoSettings
from loomtune_plugins.objectives.online.invariants import FRESH
from loomtune_plugins.objectives.online.rloo import Rloo
from loomtune_plugins.objectives.online.rloo_settings import RlooSettings
from loomtune_plugins.objectives.online.telling import EMPTY_BATCHES, NoReward, NothingWritten
from loomtune_plugins.objectives.sft import Sft
from loomtune_plugins.objectives.sft_settings import SftSettings
from online_fakes import (
    EOS,
    ROWS,
    A,
    B,
    C,
    Scripted,
    Worth,
    drawn,
    gradient,
    grpo,
    learned,
    letters,
    run_of,
    steps_of,
    texts,
)

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


def test_who_is_asked_to_leave_during_a_rollout_leaves_before_it_is_scored() -> None:
    run = run_of(grpo(lambda _: pytest.fail("it was scored")))
    run.stop.asked = True
    with pytest.raises(Preempted, match="during a rollout"):
        steps_of(run)
    assert not run.events.rollouts  # type: ignore[attr-defined]


def test_an_empty_completion_counts_and_is_no_crash() -> None:
    run = run_of(grpo(), Scripted([], [A, EOS], [B], []))
    (step,) = steps_of(run)
    assert [(len(sample.segments), sample.numbers["sequences"]) for sample in step] == [(2, 4)]
    loss, _ = learned(run, step)
    assert (
        math.isfinite(loss) and run.noted["completions/empty"] == 0.5 and run.noted["completions/mean_length"] == 0.75
    )


def test_a_batch_of_nothing_but_empty_completions_makes_no_step() -> None:
    run = run_of(grpo(), Scripted([]))
    assert [steps_of(run) for _ in range(EMPTY_BATCHES - 1)] == [[]] * (EMPTY_BATCHES - 1)
    with pytest.raises(NothingWritten, match="8 batches one after the other have no completion with a token"):
        steps_of(run)


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
