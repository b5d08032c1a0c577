"""The loop's own promises, on the toy network: what a step is divided by, what guards may do, where a run goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loomtune import checkpoint
from loomtune.contracts import Batch, Evaluator, LossSums, Verdict
from loomtune.errors import LeaseLost, LoomtuneError, Preempted, RunFailed, UserError
from loomtune.lease import Lease
from loomtune.loop import Loop
from loomtune.run import Run
from loomtune.samplers import Counted, Packed
from loomtune.settings import EvaluateSettings
from toys import TEXTS, Diary, Online, Plain, Scripted, Toy, TwoNetworks, made, sample, whole


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(toy: Toy) -> Toy:
    toy.train()
    return toy


def visits(objective: Plain, size: int = 2) -> list[list[int]]:
    """The samples' numbers of each step, whatever its micro-batches were."""
    flat = [number for seen in objective.seen for number in seen]
    return [sorted(flat[begin : begin + size]) for begin in range(0, len(flat), size)]


def agree(one: Diary, other: Diary) -> None:
    assert len(one.steps) == len(other.steps) > 0
    for mine, theirs in zip(one.steps, other.steps, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_add_up_to_the_step(micro: int, tmp_path: Path) -> None:
    assert len({len(text) for text in TEXTS}) > 4, "with rows of one length a mean of means would pass"
    whole = trained(made(tmp_path / "whole", size=4, micro=4))
    parts = trained(made(tmp_path / "parts", size=4, micro=micro))
    agree(parts.diary, whole.diary)


def test_a_loss_is_a_mean_so_that_what_each_target_counts_cancels(tmp_path: Path) -> None:
    agree(trained(made(tmp_path / "1", Plain(1.0))).diary, trained(made(tmp_path / "3", Plain(3.0))).diary)


def test_a_step_is_a_row_of_the_order_and_each_visit_has_a_number_of_its_own(tmp_path: Path) -> None:
    toy = trained(made(tmp_path, objective := Plain(), texts=TEXTS[:3], steps=4))
    assert visits(objective) == [[0, 1], [2, 3], [4, 5], [6, 7]], "a row's second visit draws another dropout"
    rows, lengths = whole(0, 3).rows(0, 8), toy.run.splits["train"].lengths
    expected = [sum(lengths[rows[number]] - 1 for number in pair) for pair in visits(objective)]
    assert [step["tokens"] for step in toy.diary.steps] == expected
    assert [step["tokens_seen"] for step in toy.diary.steps] == [sum(expected[: n + 1]) for n in range(4)]


def test_the_last_step_of_the_last_epoch_may_be_short(tmp_path: Path) -> None:
    trained(made(tmp_path, objective := Plain(), texts=TEXTS[:5], steps=3, sampler=Counted(whole(0, 5), 2, 5)))
    assert visits(objective) == [[0, 1], [2, 3], [4]]


def test_the_first_step_is_step_1_for_the_schedule(tmp_path: Path) -> None:
    assert [step["lr"] for step in trained(made(tmp_path)).diary.steps] == [0.05, 0.1, 0.05, 0.1]


def test_a_step_whose_rows_all_weigh_nothing_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="step 1 has nothing to learn from"):
        made(tmp_path, Plain(0.0)).train()


class HalfSilent(TwoNetworks):
    """The second network has nothing to learn."""

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"loss": float(len(batch.target)), "second": 0.0}

    def loss(self, roles: Any, batch: Batch, totals: Any, statistics: Any) -> LossSums:
        result = super().loss(roles, batch, totals, statistics)
        unknown = torch.full((), math.nan), torch.zeros(())
        return LossSums(result.terms, {"nobody": unknown})


def test_a_term_without_weight_counts_nothing_and_moves_nothing(tmp_path: Path) -> None:
    toy = made(tmp_path, HalfSilent(), steps=1)
    toy.assembly.build_roles()
    before = toy.weights("value")
    status = toy.train()
    (step,) = toy.diary.steps
    assert status == "completed"
    assert step["second"] == 0.0 and step["loss"] > 0
    assert math.isnan(step["nobody"]), "a mean over nothing is not 0"
    assert equal(before, toy.weights("value"))


def test_two_networks_are_judged_once_by_their_norm_together(tmp_path: Path) -> None:
    guard = Scripted()
    toy = trained(made(tmp_path, TwoNetworks(), steps=3, guards=[guard]))
    assert [step for step, _, _ in guard.asked] == [1, 2, 3]
    assert [norm for _, _, norm in guard.asked] == [step["grad_norm"] for step in toy.diary.steps]
    assert [loss for _, loss, _ in guard.asked] == [step["loss"] for step in toy.diary.steps]
    apart = trained(made(tmp_path / "alone", Plain(), steps=1)).diary.steps[0]
    assert toy.diary.steps[0]["grad_norm"] > apart["grad_norm"]


Weights = dict[str, dict[str, torch.Tensor]]


def snapshots(toy: Toy, event: str) -> list[tuple[int, Weights]]:
    """The step and all networks' weights at each event of a kind, filled while the run trains."""
    found: list[tuple[int, Weights]] = []
    tell = toy.run.events.tell

    def told(name: str, **arguments: Any) -> None:
        if name == event:
            found.append((arguments["step"], {role: toy.weights(role) for role in toy.run.roles}))
        tell(name, **arguments)

    toy.run.events.tell = told  # type: ignore[method-assign]
    return found


def test_several_networks_take_a_step_together_or_not_at_all(tmp_path: Path) -> None:
    toy = made(tmp_path, TwoNetworks(), steps=3, guards=[Scripted(), Scripted(step2=Verdict.SKIP)])
    told = snapshots(toy, "step_finished")
    assert toy.train() == "completed"
    first, skipped, third = (weights for _, weights in told)
    for role in ("policy", "value"):
        assert equal(first[role], skipped[role]), f"{role} moved in a step that was skipped"
        assert not equal(skipped[role], third[role]), f"{role} stayed where nothing was wrong"


def test_a_skipped_step_leaves_no_gradient_behind(tmp_path: Path) -> None:
    guard = Scripted(step1=Verdict.SKIP)
    toy = trained(made(tmp_path, Plain(), steps=2, guards=[guard], texts=TEXTS[:2]))
    first, second = toy.diary.steps
    assert (second["loss"], second["grad_norm"]) == pytest.approx((first["loss"], first["grad_norm"]), rel=1e-5)


def test_the_gravest_verdict_holds_and_stop_says_why(tmp_path: Path) -> None:
    guards = [Scripted(step2=Verdict.STOP), Scripted(step2=Verdict.SKIP)]
    toy = made(tmp_path, guards=guards)
    told = snapshots(toy, "step_finished")
    with pytest.raises(RunFailed, match="step 2: as it was written"):
        toy.train()
    ((_, weights),) = told
    assert equal(weights["policy"], toy.weights()), "nothing changes in the step that stops"


@pytest.mark.parametrize(("every", "back"), [(3, 3), (4, 4)], ids=["some steps back", "just saved"])
def test_a_roll_back_goes_on_from_the_checkpoint_with_rows_that_were_not_met(
    every: int, back: int, tmp_path: Path
) -> None:
    toy = made(tmp_path, objective := Plain(), steps=6, every=every, guards=[Scripted(step5=Verdict.ROLL_BACK)])
    told = snapshots(toy, "step_started")
    assert toy.train() == "completed"
    again = [*range(back + 1, 7)]
    assert [step for step, _ in told] == [1, 2, 3, 4, 5, *again]
    saved, restored = told[back][1], told[5][1]
    assert equal(saved["policy"], restored["policy"]), "the weights are those that were saved"
    assert visits(objective) == [[2 * n, 2 * n + 1] for n in range(5 + len(again))], "no row is met twice"
    through = [step["tokens_seen"] for step in toy.diary.steps]
    assert through[5] == through[back - 1] + toy.diary.steps[5]["tokens"], "what was undone does not count"


def test_a_step_that_is_rolled_back_is_told_by_its_own_number(tmp_path: Path) -> None:
    toy = made(tmp_path, steps=3, every=1, guards=[Scripted(step2=Verdict.ROLL_BACK)])
    told = snapshots(toy, "step_finished")
    toy.train()
    assert [step for step, _ in told] == [1, 2, 2, 3]


def test_a_roll_back_without_a_checkpoint_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"set checkpoint\.every"):
        made(tmp_path, guards=[Scripted(step1=Verdict.ROLL_BACK)]).train()


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = trained(made(tmp_path / "whole", steps=5))
    first = made(tmp_path / "parted", steps=5, stop_after=2)
    assert first.train() == "stopped"
    second = trained(made(tmp_path / "parted", objective := Plain(), steps=5))
    assert first.diary.steps + second.diary.steps == whole.diary.steps
    assert visits(objective)[0] == [4, 5]
    assert equal(second.weights(), whole.weights())


def packed() -> Packed:
    """Steps of two rows of 16 tokens, for three epochs of the toy's texts."""
    lengths = np.array([sample(text).length for text in TEXTS])
    return Packed(whole(0, len(TEXTS)), 2, 3 * len(TEXTS), lengths, 16)


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_a_run_of_packed_steps_goes_on_to_the_bit(stop_after: int, tmp_path: Path) -> None:
    steps = packed().steps()
    whole = trained(made(tmp_path / "whole", steps=steps, sampler=packed()))
    first = made(tmp_path / "parted", steps=steps, stop_after=stop_after, sampler=packed())
    assert first.train() == "stopped"
    second = trained(made(tmp_path / "parted", steps=steps, sampler=packed()))
    assert first.diary.steps + second.diary.steps == whole.diary.steps
    assert equal(second.weights(), whole.weights())
    assert sum(step["tokens"] for step in whole.diary.steps) == 3 * sum(sample(text).targets for text in TEXTS)


def test_packed_steps_that_are_rolled_back_are_not_met_again(tmp_path: Path) -> None:
    script = Scripted(step5=Verdict.ROLL_BACK)
    toy = trained(made(tmp_path, objective := Plain(), steps=6, every=2, guards=[script], sampler=packed()))
    assert toy.run.step == 6 and len(toy.diary.steps) == 7
    numbers = [number for seen in objective.seen for number in seen]
    assert sorted(numbers) == list(range(len(numbers))), "no visit is met twice"
    straight = trained(made(tmp_path / "straight", steps=7, sampler=packed())).diary.steps
    assert [step["tokens"] for step in toy.diary.steps] == [step["tokens"] for step in straight]


@pytest.mark.parametrize("stop_after", [2, 3, 4])
def test_steps_made_of_drawn_rows_survive_a_checkpoint_to_the_bit(stop_after: int, tmp_path: Path) -> None:
    whole = trained(made(tmp_path / "whole", uncut := Online(), steps=7))
    first = trained(made(tmp_path / "parted", before := Online(), steps=7, stop_after=stop_after))
    second = trained(made(tmp_path / "parted", after := Online(), steps=7))
    assert first.diary.steps + second.diary.steps == whole.diary.steps
    assert equal(second.weights(), whole.weights())
    assert before.asked + after.asked == uncut.asked, "rows are rolled out once"
    assert len(uncut.asked) == 3


def test_a_request_to_stop_is_heard_at_the_step_s_edge_and_saved(tmp_path: Path) -> None:
    toy = made(tmp_path, steps=4)
    tell = toy.run.events.tell

    def told(event: str, **arguments: Any) -> None:
        toy.run.stop.asked |= event == "step_started" and arguments["step"] == 2
        tell(event, **arguments)

    toy.run.events.tell = told  # type: ignore[method-assign]
    assert toy.train() == "preempted"
    assert checkpoint.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000002"
    assert len(toy.diary.steps) == 2


def test_an_attempt_that_was_superseded_ends_at_the_step_s_edge_and_commits_nothing(tmp_path: Path) -> None:
    toy = made(tmp_path, steps=6, every=3)
    tell = toy.run.events.tell

    def told(event: str, **arguments: Any) -> None:
        if event == "step_started" and arguments["step"] == 2:
            Lease.take(tmp_path)
        tell(event, **arguments)

    toy.run.events.tell = told  # type: ignore[method-assign]
    with pytest.raises(LeaseLost, match="writes to this run"):
        toy.train()
    assert len(toy.diary.steps) == 2
    assert checkpoint.latest(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("error", [Preempted("asked to leave"), UserError.of("bad rows", "mend them")])
def test_rows_that_cannot_be_had_cost_no_step_that_was_trained(tmp_path: Path, error: LoomtuneError) -> None:
    whole = trained(made(tmp_path / "whole"))
    toy = made(tmp_path / "run")
    toy.assembly.build_roles()
    loop = Loop(toy.run, toy.assembly.keeper)
    draw = loop.feed.draw

    def dry() -> list[Any]:
        if loop.feed.fetched == 4:
            raise error
        return draw()

    loop.feed.draw = dry  # type: ignore[method-assign]
    with pytest.raises(type(error)):
        loop.train()
    latest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert latest is not None and checkpoint.step_of(latest) == toy.run.step == 2
    again = trained(made(tmp_path / "run"))
    assert toy.diary.steps + again.diary.steps == whole.diary.steps and equal(again.weights(), whole.weights())


def test_a_checkpoint_is_committed_by_whoever_waits_for_rows(tmp_path: Path) -> None:
    toy = made(tmp_path, every=1)
    toy.assembly.build_roles()
    loop = Loop(toy.run, toy.assembly.keeper)
    draw, found = loop.feed.draw, list[Path | None]()

    def late() -> list[Any]:
        assert not loop._agree()
        found.append(checkpoint.latest(tmp_path / "checkpoints"))
        return draw()

    loop.feed.draw = late  # type: ignore[method-assign]
    assert loop.train() == "completed"
    assert [path and checkpoint.step_of(path) for path in found] == [None, 1, 2, 3]


def test_a_request_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    toy = made(tmp_path, steps=1)
    toy.run.stop.asked = True
    assert toy.train() == "completed"


class Long(Evaluator):
    """A measurement in three pieces. asked_in: the first whole evaluation in which a request to stop comes; 0: none."""

    def __init__(self, asked_in: int = 0) -> None:
        self.asked_in, self.begun = asked_in, 0

    def evaluate(self, run: Run) -> Mapping[str, float]:
        self.begun += 1
        for piece in range(3):
            run.stop.asked |= self.begun == self.asked_in and piece == 1
            run.heed()
        return {"x": float(next(iter(run.policy.engine.stream_weights()))[1].sum())}


def measured(toy: Toy) -> list[tuple[int, float]]:
    """The step and value of every evaluation that was told, filled while the run trains."""
    found: list[tuple[int, float]] = []
    tell = toy.run.events.tell

    def told(event: str, **arguments: Any) -> None:
        if event == "evaluated":
            found.append((arguments["step"], arguments["metrics"]["x"]))
        tell(event, **arguments)

    toy.run.events.tell = told  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize(("asked_in", "step"), [(1, 2), (2, 4)], ids=["in the midst of the run", "after its last step"])
def test_a_request_to_stop_ends_an_evaluation_which_is_made_when_the_run_goes_on(
    asked_in: int, step: int, tmp_path: Path
) -> None:
    settings = EvaluateSettings(every=2, best="x", mode="max")
    whole = made(tmp_path / "whole", evaluate=settings, evaluators={"long": Long()})
    expected = measured(whole)
    assert whole.train() == "completed" and [at for at, _ in expected] == [2, 4]

    first = made(tmp_path / "run", evaluate=settings, evaluators={"long": (long := Long(asked_in))})
    before = measured(first)
    assert first.train() == "preempted" and long.begun == asked_in
    latest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert latest is not None and checkpoint.step_of(latest) == first.run.step == step
    assert before == expected[: asked_in - 1], "what was not finished is nowhere"
    assert first.run.metrics.get("x") == (before[-1][1] if before else None)

    second = made(tmp_path / "run", evaluate=settings, evaluators={"long": Long()})
    after = measured(second)
    assert second.train() == "completed"
    assert before + after == expected and second.run.metrics["x"] == expected[-1][1]
    assert equal(second.weights(), whole.weights())
    best, meant = (checkpoint.best(tmp_path / name / "checkpoints") for name in ("run", "whole"))
    assert best is not None and meant is not None and best.name == meant.name
    again = made(tmp_path / "run", evaluate=settings, evaluators={"long": (long := Long())})
    assert again.train() == "completed" and long.begun == 0, "nothing is owed any more"


def test_an_evaluation_is_not_begun_by_who_was_asked_to_stop_and_is_owed(tmp_path: Path) -> None:
    settings = EvaluateSettings(every=1)
    toy = made(tmp_path, steps=2, evaluate=settings, evaluators={"long": (long := Long())})
    toy.run.stop.asked = True
    assert toy.train() == "preempted" and (toy.run.step, long.begun) == (1, 0)
    again = made(tmp_path, steps=2, evaluate=settings, evaluators={"long": Long()})
    found = measured(again)
    assert again.train() == "completed" and [step for step, _ in found] == [1, 2]


def test_a_request_in_the_evaluation_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    settings = EvaluateSettings(before=True)
    with pytest.raises(Preempted, match="during an evaluation"):
        made(tmp_path, evaluate=settings, evaluators={"long": Long(1)}).train()
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_a_run_that_is_over_trains_no_further(tmp_path: Path) -> None:
    trained(made(tmp_path, steps=2))
    again = made(tmp_path, objective := Plain(), steps=2)
    assert again.train() == "completed"
    assert objective.seen == [] and again.run.step == 2
