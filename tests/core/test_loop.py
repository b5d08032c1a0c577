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
from loomtune.contracts import Batch, LossSums, Verdict
from loomtune.errors import LeaseLost, RunFailed
from loomtune.lease import Lease
from loomtune.order import Order
from loomtune.samplers import Counted, Packed
from toys import TEXTS, Diary, Online, Plain, Scripted, Toy, TwoNetworks, made, sample


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
    order, lengths = Order.whole(0, 3), toy.run.splits["train"].lengths
    expected = [sum(lengths[order.row(number)] - 1 for number in pair) for pair in visits(objective)]
    assert [step["tokens"] for step in toy.diary.steps] == expected
    assert [step["tokens_seen"] for step in toy.diary.steps] == [sum(expected[: n + 1]) for n in range(4)]


def test_the_last_step_of_the_last_epoch_may_be_short(tmp_path: Path) -> None:
    trained(made(tmp_path, objective := Plain(), texts=TEXTS[:5], steps=3, sampler=Counted(Order.whole(0, 5), 2, 5)))
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
    return Packed(Order.whole(0, len(TEXTS)), 2, 3 * len(TEXTS), lengths, 16)


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
        toy.run.stop.requested |= event == "step_started" and arguments["step"] == 2
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


def test_a_request_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    toy = made(tmp_path, steps=1)
    toy.run.stop.requested = True
    assert toy.train() == "completed"


def test_a_run_that_is_over_trains_no_further(tmp_path: Path) -> None:
    trained(made(tmp_path, steps=2))
    again = made(tmp_path, objective := Plain(), steps=2)
    assert again.train() == "completed"
    assert objective.seen == [] and again.run.step == 2
