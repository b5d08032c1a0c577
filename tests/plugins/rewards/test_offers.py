"""Which rewards go with which other choices, and what is said of weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins import evaluators, rewards

SMALL = ("data=sql_quiz", "data.train=8", "data.validation=4", "data.test=4")


def check(*overrides: str) -> list[str]:
    return [finding.what for finding in api.check(api.compose([*SMALL, *overrides]))]


def test_an_objective_that_takes_no_reward_is_told_so() -> None:
    with pytest.raises(UserError, match="takes no reward, but sql is chosen") as refused:
        check("objective=sft", "reward=[sql]")
    assert "evaluator=[reward]" in str(refused.value)


def test_any_objective_may_be_measured_by_rewards() -> None:
    assert not [told for told in check("objective=sft", "reward=[sql]", "evaluator=[reward]") if "reward" in told]


def test_an_online_objective_needs_one() -> None:
    with pytest.raises(UserError, match="no reward says what a completion is worth"):
        check("objective=grpo")


def chosen(**axes: Any) -> Any:
    return SimpleNamespace(choices=lambda axis: axes.get(axis, {}))


def test_measuring_by_rewards_needs_one() -> None:
    (found,) = evaluators.preflight(chosen(evaluator={"reward": {}}), {})
    assert found.fatal and "measures by rewards, and none is chosen" in found.what
    assert not evaluators.preflight(chosen(evaluator={"reward": {}}, reward={"sql": {}}), {})
    assert not evaluators.preflight(chosen(evaluator={"heldout": {}}), {})


@pytest.mark.parametrize(("weight", "said"), [(0, "learns nothing of it"), (-1.0, "makes likelier what it scores low")])
def test_a_weight_that_may_not_be_meant_is_told(weight: float, said: str) -> None:
    (found,) = rewards.preflight(chosen(reward={"sql": {"weight": 0.5}, "theirs": {"weight": weight}, "odd": {}}), {})
    assert f"reward.theirs.weight={weight}" in found.what and said in found.what and not found.fatal


def test_a_function_that_is_not_there_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="ModuleNotFoundError at its beginning: No module named 'nothing_of_this_name'"):
        check("objective=grpo", "reward=[function]", f"reward.function.function={tmp_path}/mine.py:score")


def test_data_that_lack_what_a_reward_looks_at_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    rows = ("data=jsonl", f"data.path={tmp_path}/rows.jsonl", "data.prompt=question", "objective=grpo", "evaluator=[]")
    with pytest.raises(UserError, match=r"reward=exact: the first row of `train` has no right answer"):
        api.check(api.compose([*rows, "reward=[exact]"]))
    with pytest.raises(UserError, match="needs `databases`"):
        api.check(api.compose([*rows, "reward=[sql]"]))


def test_patience_money_and_places_of_a_judge_may_be_others_when_a_run_goes_on() -> None:
    def planned(*more: str, model: str = "m") -> Any:
        judge = ("objective=grpo", "reward=[judge]", "reward.judge.url=http://h/v1", f"reward.judge.model={model}")
        return api.compose([*SMALL, *judge, *more])

    plan = planned()
    for key, value in {"max_cost": 5.0, "cache": "/tmp/x", "retries": 2, "key_variable": "OTHER"}.items():
        assert planned(f"reward.judge.{key}={value}").hash == plan.hash, key
    assert planned(model="other").hash != plan.hash
