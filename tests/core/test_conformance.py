"""Every built-in offer keeps its contract, by the kit that authors of plugins run; and the kit sees what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from loomtune.catalogue import BUILT_IN, Entry, installed
from loomtune.contracts import Batch, LossSums, Schedule, Tracker
from loomtune.offers import Offer
from loomtune.testing import (
    check_light,
    check_objective,
    check_offer,
    check_optimizer,
    check_schedule,
    check_sharding,
    check_tracker,
)

ROWS = [
    {"prompt": "a loom", "completion": " weaves"},
    {"prompt": "warp", "completion": " and weft, over and under"},
    {"prompt": "x", "completion": "y"},
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"][::-1]} for row in ROWS]
TEXTS = [{"text": row["prompt"] + row["completion"]} for row in ROWS]
LABELS = [{**row, "label": i != 1} for i, row in enumerate(ROWS)]
ROWS_OF = {"completions": ROWS, "pairs": PAIRS, "labels": LABELS, "texts": TEXTS, "prompts": ROWS}
"""What objectives learn from, by the trait that they need; those that need neither make samples while training."""


def entries(axis: str | None = None) -> list[Any]:
    found = [entry for entry in installed().entries(axis) if entry.source.distribution == "loomtune"]
    return [pytest.param(entry, id=f"{entry.axis.name}={entry.offer.name}") for entry in found]


def built(entry: Entry, **settings: Any) -> Any:
    return installed().build(entry.axis.name, entry.offer.name, settings)


@pytest.mark.parametrize("entry", entries())
def test_an_offer_is_whole(entry: Entry) -> None:
    check_offer(entry.axis.name, entry.offer)


def test_offers_and_schemas_are_made_without_heavy_libraries() -> None:
    check_light([*BUILT_IN, *sorted({entry.offer.schema.__module__ for entry in installed().entries()})])


@pytest.mark.parametrize("entry", entries("schedule"))
def test_a_schedule_is_a_pure_factor(entry: Entry) -> None:
    check_schedule(built(entry))


@pytest.mark.parametrize("entry", entries("optimizer"))
def test_an_optimizer_keeps_the_state_that_it_declares(entry: Entry) -> None:
    check_optimizer(built(entry))


@pytest.mark.parametrize("entry", entries("tracker"))
def test_a_tracker_bears_every_event(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    catalogue = installed()
    beside = {
        other.offer.name: lambda other=other: built(other)
        for other in catalogue.entries("tracker")
        if other.offer.provides & entry.offer.needs
    }
    check_tracker(lambda: built(entry), tmp_path, beside)


@pytest.mark.parametrize("entry", entries("sharding"))
def test_a_sharding_sums_and_goes_on_in_one_process(entry: Entry) -> None:
    check_sharding(built(entry))


@pytest.mark.parametrize("entry", entries("objective"))
def test_an_objective_adds_up(entry: Entry) -> None:
    rows = next((ROWS_OF[need] for need in sorted(entry.offer.needs) if need in ROWS_OF), None)
    if rows is None:
        pytest.skip("makes its samples while training")
    objective, catalogue = built(entry), installed()
    losses = {name: catalogue.build("loss", name, {}) for name in entry.offer.brings.get("loss", ())}
    if losses and not objective.takes_rewards():
        objective.use(losses, {})
    check_objective(objective, rows, losses=losses)


@pytest.mark.parametrize("loss", list(installed().entries("loss")), ids=str)
def test_a_loss_of_pairs_adds_up(loss: Entry) -> None:
    objective = installed().build("objective", "dpo", {})
    objective.use({loss.offer.name: built(loss)}, {})
    if not objective.losses[loss.offer.name].looks_around:  # then micro-batches alone say nothing
        check_objective(objective, ROWS_OF["pairs"])


class Averaging:
    """What the kit must see: an objective that averages inside its micro-batch."""

    def __init__(self, sft: Any) -> None:
        self.sft = sft

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sft, name)

    def loss(self, roles: Any, batch: Batch, totals: Any, statistics: Any) -> LossSums:
        summed = self.sft.loss(roles, batch, totals, statistics).terms["loss"]
        return LossSums({"loss": summed / len(batch.target)})


def sft() -> Any:
    return installed().build("objective", "sft", {})


def test_the_kit_sees_a_mean_inside_a_micro_batch() -> None:
    with pytest.raises(AssertionError, match="empty batch has a loss"):
        check_objective(Averaging(sft()), ROWS)


def test_the_kit_sees_weights_that_do_not_add_up() -> None:
    objective = Averaging(sft())
    objective.weights = lambda batch: {"loss": float(len(batch.target) > 0)}
    with pytest.raises(AssertionError, match="micro-batches weigh"):
        check_objective(objective, ROWS)


def test_the_kit_sees_a_loss_that_does_not_reach_the_parameters() -> None:
    import torch

    objective = Averaging(sft())
    objective.loss = lambda roles, batch, totals, statistics: LossSums({"loss": torch.zeros((), requires_grad=True)})
    with pytest.raises(AssertionError, match="does not reach"):
        check_objective(objective, ROWS)


def test_the_kit_sees_a_sample_that_is_not_cut() -> None:
    objective = Averaging(sft())
    objective.sample = lambda row, tokenizer, max_length: sft().sample(row, tokenizer, 1000)
    with pytest.raises(AssertionError, match="max_length="):
        check_objective(objective, ROWS)


class Remembering(Schedule):
    def __init__(self) -> None:
        self.asked = 0

    def factor(self, step: int, steps: int) -> float:
        self.asked += 1
        return 1 / self.asked


def test_the_kit_sees_a_schedule_with_a_memory() -> None:
    with pytest.raises(AssertionError, match="depends on what was asked before"):
        check_schedule(Remembering())


class Silent(Tracker):
    def describe(self, run: Any) -> str:
        return ""


def test_the_kit_sees_a_tracker_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="one line"):
        check_tracker(Silent, tmp_path)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"name": "My Tracker"}, "lower-case"),
        ({"summary": ""}, "summary"),
        ({"provides": frozenset({"fast"})}, "prefix:fast"),
        ({"schema": int}, "no dataclass"),
        ({"build": "loomtune.testing.toy:ToyKernel"}, "is no Tracker"),
        ({"excludes": {"quick": "x"}}, "prefix:quick"),
        ({"excludes": {"pairs": ""}}, "without a reason"),
        ({"excludes": {"pairs": "two lines\nof it"}}, "reason of one line"),
        ({"excludes": {"pairs": "x"}, "needs": frozenset({"pairs"})}, "both needs and excludes pairs"),
        ({"variants": {"Often": ("tracker.every=2",)}}, "lower-case"),
        ({"variants": {"often": ()}}, "sets nothing"),
        ({"variants": {"often": ("sharding.every=2",)}}, "a variant sets tracker"),
        ({"variants": {"often": ("tracker.evry=2",)}}, "does not compose"),
        ({"variants": {"often": ("tracker.every=two",)}}, "does not compose"),
        ({"variants": {"often": ("tracker.every=2",), "oft": ("tracker.every=2",)}}, "the same as 'often'"),
    ],
)
def test_the_kit_sees_an_offer_that_is_not_whole(change: Mapping[str, Any], seen: str) -> None:
    offer = installed().find("tracker", "console").offer
    with pytest.raises(AssertionError, match=seen):
        check_offer("tracker", replace(offer, **change))


def test_the_kit_sees_a_setting_without_help() -> None:
    @dataclass
    class Unexplained:
        """Settings."""

        lr: float = 1.0

    offer: Offer[Any] = replace(installed().find("tracker", "jsonl").offer, schema=Unexplained)
    with pytest.raises(AssertionError, match="lr needs its help"):
        check_offer("tracker", offer)


def test_the_kit_sees_a_module_that_imports_torch() -> None:
    with pytest.raises(AssertionError, match="imports torch"):
        check_light(["loomtune.testing.toy"])


class Forgetful:
    """What the kit must see: an optimizer that declares less than it keeps."""

    def __init__(self) -> None:
        self.adamw = installed().build("optimizer", "adamw", {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adamw, name)

    def state(self) -> Mapping[str, Any]:
        return {name: kind for name, kind in self.adamw.state().items() if name != "step"}


def test_the_kit_sees_an_optimizer_that_forgets_its_state() -> None:
    with pytest.raises(AssertionError, match="declares"):
        check_optimizer(Forgetful())


def test_the_kit_sees_a_sharding_that_averages() -> None:
    sharding = installed().build("sharding", "single", {})
    engine = sharding.engine

    def averaging(spec: Any, world: Any) -> Any:
        made = engine(spec, world)
        backward, micro = made.backward, [0]

        def halved(loss: Any) -> None:
            micro[0] += 1
            backward(loss / (3 if micro[0] <= 3 else 1))

        made.backward = halved
        return made

    sharding.engine = averaging
    with pytest.raises(AssertionError, match="gradient norm"):
        check_sharding(sharding)
