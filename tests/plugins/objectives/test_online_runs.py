"""Whole runs that learn from what they write: no layout, restart or sharing changes what is written or learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins.objectives.online import checks
from runs.worlds import Outcome, Worlds
from runs.writing import written
from support import write_rows

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "micro-batches of 1": (1, ["sharding=single", "batch.micro=1"]),
    "packed": (1, ["sharding=single", "packing=true"]),
    "no shared prompts": (1, ["sharding=single", "batch.share=never"]),
    "shared prompts": (1, ["sharding=single", "batch.share=always"]),
    "ddp on 2": (2, ["sharding=ddp", "rollout.batch=3"]),
    "ddp, sequence 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp", "batch.micro=2"]),
    "fsdp, tensor 2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "fsdp on 3, more than there are prompts in a step": (3, ["sharding=fsdp"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3", "batch.micro=2"]),
}
EVERYDAY = ("shared prompts", "fsdp on 2")

WITHIN = {"loss": 1e-4, "grad_norm": 1e-3, "entropy": 1e-4, "ratio/max": 1e-4, "kl": 1e-4}
"""Largest differences: of the loss absolute, as it cancels; of the others relative to 1 or to themselves."""

EXACT = ("tokens", "rewards/mean", "rewards/std", "groups/equal", "completions/mean_length", "completions/ended")

KINDS: dict[str, list[str]] = {
    "grpo": ["objective=grpo", "objective.epochs=2", "objective.minibatches=2", "objective.beta=0.05"],
    "one step": ["objective=grpo", "objective.variant=dapo", "objective.dynamic=2"],
    "rloo": ["objective=rloo", "objective.epochs=2"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [{"prompt": f"{number:02} {'ab ' * (number % 4)}", "gold": number} for number in range(40)]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", made)


@pytest.fixture(scope="module")
def tiny(tied_model: Path, rows: Path) -> list[str]:
    """A policy that writes a few letters, and is rewarded for vowels and for few of them."""
    reward = ["reward=[format,length]", "reward.format.pattern='[aeiouAEIOU]'", "reward.format.whole=false"]
    reward += ["reward.length.longest=4", "reward.length.margin=6", "reward.length.weight=0.5"]
    draws = ["objective.group=4", "objective.max_new_tokens=10", "batch.size=4"]
    how = ["optimizer.lr=3e-3", "steps=10", "tracker=[jsonl]", "checkpoint.background=false", "evaluator=[]"]
    return [f"model.path={tied_model}", "data=jsonl", f"data.path={rows}", "max_length=64", *reward, *draws, *how]


Alone = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    made: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(*settings: str) -> dict[str, Any]:
        if settings not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[settings] = worlds.train(1, [*tiny, *settings, "sharding=single"], folder, work=written).result
        return made[settings]

    return of


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same was written, and the same was learned of it."""
    assert len(one["heard"]) > 10 and other["heard"] == one["heard"]
    assert len(one["lines"]) == len(other["lines"]) == 10
    for ours, theirs in zip(other["lines"], one["lines"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in EXACT:
            assert ours.get(name) == theirs.get(name), name
        for name, within in WITHIN.items():
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=within, abs=within), name


def slowly(name: str, everyday: tuple[str, ...]) -> Any:
    return pytest.param(name, marks=() if name in everyday else pytest.mark.slow)


@pytest.mark.parametrize("layout", [slowly(name, EVERYDAY) for name in LAYOUTS])
@pytest.mark.parametrize("adapter", [slowly(name, ("full",)) for name in ("full", "lora")])
@pytest.mark.parametrize("kind", [slowly(name, ("grpo",)) for name in KINDS])
def test_every_layout_writes_the_same_and_learns_the_same_of_it(
    kind: str, adapter: str, layout: str, worlds: Worlds, alone: Alone, tiny: list[str], tmp_path: Path
) -> None:
    if adapter == "lora" and "tensor" in layout:
        pytest.skip("linear layers that are wrapped are not cut")
    size, how = LAYOUTS[layout]
    chosen = [*KINDS[kind], f"adapter={adapter}"]
    one = alone(*chosen)
    assert any(line["grad_norm"] > 0.01 for line in one["lines"]) and any("rewards/mean" in x for x in one["lines"])
    same(one, worlds.train(size, [*tiny, *chosen, *how], tmp_path / "run", work=written).result)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp on 2", "zero 3 on 2"])
def test_64_long_completions_a_step_are_the_same_on_every_layout(
    layout: str, worlds: Worlds, alone: Alone, tiny: list[str], tmp_path: Path
) -> None:
    size, how = LAYOUTS[layout]
    changed = ("objective.group", "objective.max_new_tokens", "batch.size", "max_length", "reward.length")
    kept = [each for each in tiny if not each.startswith(changed)]
    chosen = [*kept, *KINDS["grpo"], "reward.length.longest=30", "reward.length.margin=30", "batch.size=64"]
    chosen += ["objective.group=2", "objective.max_new_tokens=64", "max_length=128", "objective.epochs=1"]
    chosen = list({each.partition("=")[0]: each for each in chosen}.values())
    one = worlds.train(1, [*chosen, "sharding=single"], tmp_path / "one", work=written).result
    assert len(one["heard"]) == 5 * 128
    same(one, worlds.train(size, [*chosen, *how], tmp_path / "other", work=written).result)


def completed(worlds: Worlds, tiny: list[str], folder: Path) -> Outcome:
    return worlds.train(1, [*tiny, *KINDS["grpo"], "sharding=single"], folder)


STOPS = [pytest.param(6, id="among inner epochs"), pytest.param(4, id="between batches", marks=pytest.mark.slow)]


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_is_stopped_goes_on_exactly(stop: int, worlds: Worlds, tiny: list[str], tmp_path: Path) -> None:
    whole = completed(worlds, tiny, tmp_path / "whole")
    worlds.train(1, [*tiny, *KINDS["grpo"], "sharding=single", f"stop_after={stop}"], tmp_path / "run")
    resumed = worlds.resume(1, tmp_path / "run")
    assert resumed.lines == whole.lines and len(whole.lines) == 10


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_other_processes_take_over_in_the_middle_of_a_batch(
    stop: int, worlds: Worlds, tiny: list[str], tmp_path: Path
) -> None:
    whole = completed(worlds, tiny, tmp_path / "whole")
    worlds.train(1, [*tiny, *KINDS["grpo"], "sharding=single", f"stop_after={stop}"], tmp_path / "run")
    resumed = worlds.resume(2, tmp_path / "run", "sharding=fsdp")
    assert resumed.series("loss") == pytest.approx(whole.series("loss"), abs=1e-4)
    assert resumed.series("rewards/mean") == whole.series("rewards/mean")


FINDINGS = [
    (["objective.minibatches=5"], "objective.minibatches=5 deals out 4 prompts"),
    (["adapter=lora", "adapter.dropout=0.1"], "adapter.dropout=0.1 drops out at random"),
    (["rollout=null"], "generation"),
]


@pytest.mark.parametrize(("settings", "told"), FINDINGS, ids=[told for _, told in FINDINGS])
def test_what_does_not_go_with_it_is_refused_before_the_run(settings: list[str], told: str, tiny: list[str]) -> None:
    kept = [each for each in tiny if each.partition("=")[0] not in {s.partition("=")[0] for s in settings}]
    with pytest.raises(UserError, match=told):
        api.check(api.compose([*kept, "objective=grpo", "sharding=single", *settings]))


def test_what_measures_nothing_is_doubted(tiny: list[str]) -> None:
    kept = [each for each in tiny if not each.startswith(("evaluator", "max_length"))]
    plan = api.compose([*kept, "objective=grpo", "sharding=single", "evaluator=[heldout]", "max_length=10"])
    doubts = list(checks.findings(plan))
    assert not any(doubt.fatal for doubt in doubts)
    assert ["heldout measures nothing" in doubt.what for doubt in doubts] == [True, False]
    assert "leaves no room for a prompt within max_length=10" in doubts[1].what
    assert not list(checks.findings(api.compose([*tiny, "objective=grpo", "sharding=single"])))


def test_bounds_of_ratios_that_are_all_1_are_doubted(tiny: list[str]) -> None:
    def doubted(*settings: str) -> list[str]:
        plan = api.compose([*tiny, "objective=grpo", "sharding=single", "objective.clip_high=0.3", *settings])
        return [doubt.what for doubt in checks.findings(plan)]

    assert doubted() == [
        "objective.clip_high has no effect where one step comes of a batch: all importance ratios are 1"
    ]
    assert not doubted("objective.minibatches=2")
    assert not doubted("rollout.ranks=1", "rollout.ahead=1")


def test_what_nobody_begins_ahead_is_doubted(tiny: list[str]) -> None:
    kept = [each for each in tiny if not each.startswith(("objective", "reward"))]
    (doubt,) = checks.findings(api.compose([*kept, "objective=sft", "rollout.ranks=1", "rollout.ahead=1"]))
    assert "rollout.ahead=1 has no effect with objective=sft" in doubt.what and not doubt.fatal


def test_data_without_prompts_are_refused(tiny: list[str]) -> None:
    kept = [each for each in tiny if not each.startswith("data")]
    with pytest.raises(UserError, match="prompts"):
        api.check(api.compose([*kept, "objective=grpo", "sharding=single", "data=sql_corpus"]))


def test_rows_without_a_prompt_are_named(worlds: Worlds, tiny: list[str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "texts.jsonl", [{"text": "no question"}, {"text": "none"}])
    kept = [each for each in tiny if not each.startswith("data.path")]
    plan = api.compose([*kept, "objective=grpo", "sharding=single", f"data.path={rows}", f"run.dir='{tmp_path}/run'"])
    with pytest.raises(UserError, match=r"2 of 2 rows of split train cannot be learned from:(.|\n)*no prompt"):
        api.check(plan)
        api.prepare(plan)
