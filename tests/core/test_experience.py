"""What an online objective has to go by: rows that are kept, more rows, a state of its own, and nothing lost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from letters import Letters, Pairs, Rows, row
from loomtune import checkpoint
from loomtune.contracts import Drawn, RoleSpec, Sample, Verdict
from loomtune.errors import Preempted
from loomtune.run import Run
from loomtune.samples import Source, prepare
from loomtune.toolkit import log_probs
from toys import Online, Plain, Scripted, made, sample


class Adaptive(Online):
    """Draws twice for each batch, notes how often it did so, and remembers it. leaves: in which batch a rank leaves."""

    def __init__(self, leaves: int = 0) -> None:
        super().__init__()
        self.batches, self.leaves = 0, leaves
        self.resumed: list[int] = []
        self.drawn: list[list[int]] = []

    def state(self) -> Mapping[str, Any]:
        return {"batches": self.batches}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.batches = state.get("batches", 0)
        self.resumed.append(self.batches)

    def experience(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        more = run.draw()
        if self.batches + 1 == self.leaves:
            run.stop.asked = True
        run.heed("asked to leave during a rollout")
        self.batches += 1
        self.drawn.append([one.visit for one in (*drawn, *more)])
        run.noted["batches"] = float(self.batches)
        return super().experience(run, more)


def test_rows_come_back_as_the_data_gave_them_where_the_objective_keeps_them(tmp_path: Path) -> None:
    class Files(Rows):
        def fingerprint(self) -> str:
            return "files"

    rows = [row(f"ask {i}", gold={"is": [i, None, "ü"]}, path=Path("a")) for i in range(3)]
    samples = prepare(Source(Files(rows), Pairs(), Letters(), "train", 100), tmp_path, 256)  # type: ignore[arg-type]
    assert [samples.row(i) for i in range(3)] == [{**one, "path": "a"} for one in rows]
    assert [samples.origin(i) for i in range(3)] == ["train:1", "train:2", "train:3"]


def test_rows_are_not_kept_where_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairs, "keeps_rows", lambda self: False)
    samples = prepare(Source(Rows([row()]), Pairs(), Letters(), "train", 100), tmp_path, 256)  # type: ignore[arg-type]
    assert samples.row(0) == {}


def test_more_rows_are_those_that_come_next_and_are_not_drawn_again(tmp_path: Path) -> None:
    made(tmp_path, objective := Adaptive(), steps=7).train()
    assert objective.drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_what_is_noted_joins_the_first_step_of_its_batch_alone(tmp_path: Path) -> None:
    toy = made(tmp_path, Adaptive(), steps=4)
    toy.train()
    assert [step.get("batches") for step in toy.diary.steps] == [1.0, None, None, 2.0]


@pytest.mark.parametrize("stop_after", [2, 3])
def test_the_objective_goes_on_from_its_own_state(stop_after: int, tmp_path: Path) -> None:
    made(tmp_path, Adaptive(), steps=7, stop_after=stop_after).train()
    made(tmp_path, after := Adaptive(), steps=7).train()
    assert after.resumed == [1]
    assert after.drawn == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_roll_back_takes_the_objective_s_state_back_too(tmp_path: Path) -> None:
    objective, guard = Adaptive(), Scripted(step5=Verdict.ROLL_BACK)
    made(tmp_path, objective, steps=7, every=3, guards=[guard]).train()
    assert objective.resumed == [0, 1], "after step 3 one batch was made"


def test_who_leaves_during_a_rollout_keeps_what_was_learned_and_draws_the_same_rows_again(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", uncut := Adaptive(), steps=6)
    whole.train()
    first = made(tmp_path / "parted", Adaptive(leaves=2), steps=6)
    with pytest.raises(Preempted, match="during a rollout"):
        first.train()
    assert checkpoint.latest(tmp_path / "parted" / "checkpoints") == tmp_path / "parted/checkpoints/step-00000003"
    second = made(tmp_path / "parted", after := Adaptive(), steps=6)
    second.train()
    assert after.drawn == uncut.drawn[1:]
    assert first.diary.steps + second.diary.steps == whole.diary.steps


def test_roles_are_read_in_the_samples_order_whatever_the_micro_batches_are(tmp_path: Path) -> None:
    samples = [sample(text) for text in ("loom", "a long text of many letters", "w", "reed")]
    found = []
    for micro in (1, 3):
        toy = made(tmp_path / str(micro), Plain(), size=4, micro=micro)
        toy.assembly.build_roles()
        found.append(toy.run.read(samples, lambda roles, batch: log_probs(roles["policy"], batch)))
    assert [len(one) for one in found[0]] == [one.targets for one in samples]
    for one, other in zip(*found, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_reading_keeps_no_gradient_and_takes_columns(tmp_path: Path) -> None:
    toy = made(tmp_path, Plain())
    toy.assembly.build_roles()
    (found,) = toy.run.read(
        [sample("loom", weight=2.0)],
        lambda roles, batch: torch.stack([log_probs(roles["policy"], batch), batch.columns["weight"]], 1),
    )
    assert found.shape == (4, 2)
    assert (found[:, 1] == 2.0).all()
    assert not any(p.grad is not None for p in toy.run.policy.engine.network.parameters())  # type: ignore[attr-defined]


class Headed(Plain):
    """A value that is a view of the policy's engine, though every weight is trained."""

    def __init__(self, shares: bool) -> None:
        super().__init__()
        self.shares = shares

    def roles(self) -> Mapping[str, RoleSpec]:
        value = RoleSpec(trained=True, head="value", twin_of="policy", shares=self.shares)
        return {"policy": RoleSpec(trained=True), "value": value}


@pytest.mark.parametrize("shares", [True, False])
def test_a_head_may_share_its_twin_s_engine_without_an_adapter(shares: bool, tmp_path: Path) -> None:
    toy = made(tmp_path, Headed(shares))
    toy.assembly.build_roles()
    roles = toy.run.roles
    assert (roles["value"].engine is roles["policy"].engine) is shares
    assert len(toy.run.trained_engines()) == 2 - shares


class Twice(Online):
    """Learns from the same samples in each of its steps."""

    def experience(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        (first, *_) = super().experience(run, drawn)
        return [first, first[::-1], first]


def test_a_checkpoint_keeps_one_copy_of_what_several_steps_learn_from(tmp_path: Path) -> None:
    first = made(tmp_path, Twice(), steps=6, stop_after=1)
    first.train()
    (path,) = (tmp_path / "checkpoints").glob("step-*")
    pending = json.loads((path / "state.json").read_text())["pending"]
    assert len(pending["samples"]) == 2 and pending["steps"] == [[0, 1], [1, 0]]
    second = made(tmp_path, Twice(), steps=6)
    second.train()
    whole = made(tmp_path / "whole", Twice(), steps=6)
    whole.train()
    assert first.diary.steps + second.diary.steps == whole.diary.steps
