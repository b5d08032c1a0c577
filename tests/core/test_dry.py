"""A step that is computed and dropped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loomtune.contracts import Sample
from loomtune.dry import dry_step, longest, peak, state_to_come
from loomtune.errors import UserError
from loomtune.loop import Loop
from loomtune.plan import Plan
from loomtune.world import reseed
from toys import TEXTS, Online, Plain, Toy, made


class Drawing(Plain):
    """Draws from the global state, as dropout of a plugin might."""

    def loss(self, roles: Any, batch: Any, totals: Any, statistics: Any) -> Any:
        torch.rand(3)
        return super().loss(roles, batch, totals, statistics)


class Imagining(Online):
    """Says what its steps look like."""

    def imagined(self, sample: Sample, max_length: int) -> Sequence[Sample]:
        return [self._made(sample, 0.0)]


def trained(folder: Path, *, dry: str, **parts: Any) -> Toy:
    one = made(folder, **parts)
    one.run.settings.dry_step = dry
    one.assembly.build_roles()
    one.assembly.keeper.restore()
    dry_step(one.run)
    Loop(one.run, one.assembly.keeper).train()
    return one


@pytest.mark.parametrize("objective", [Plain, Online, Imagining])
def test_a_dry_step_changes_nothing_to_the_bit(tmp_path: Path, objective: type[Plain]) -> None:
    plain, dry = (trained(tmp_path / how, dry=how, objective=objective()) for how in ("never", "always"))
    assert plain.diary.steps == dry.diary.steps
    assert all(torch.equal(plain.weights()[name], tensor) for name, tensor in dry.weights().items())
    assert plain.run.policy.engine.updates == dry.run.policy.engine.updates == 4


def test_nothing_that_plugins_might_draw_from_is_moved(tmp_path: Path) -> None:
    one = made(tmp_path, Drawing())
    one.assembly.build_roles()
    reseed(1, 2, 3)
    before = torch.get_rng_state()
    peak(one.run, longest(one.run))
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_left_out_on_a_cpu_unless_it_is_asked_for(tmp_path: Path) -> None:
    skipped, asked = (trained(tmp_path / how, dry=how, objective=Plain()) for how in ("auto", "always"))
    seen: list[list[Any]] = [one.run.objective.seen for one in (skipped, asked)]  # type: ignore[attr-defined]
    assert len(seen[1]) == len(seen[0]) + 2
    assert not (tmp_path / "auto" / "measured.json").exists()


def test_it_computes_the_longest_rows_in_two_micro_batches_of_the_runs_size(tmp_path: Path) -> None:
    run = made(tmp_path, size=4, micro=1).run
    widths = [batch.tokens.shape for batch in longest(run)]
    by_length = sorted((len(text) + 1 for text in TEXTS), reverse=True)
    assert widths == [(1, length) for length in by_length[:2]]


@pytest.mark.parametrize(("minibatches", "rows"), [(1, 4), (2, 2)])
def test_epochs_repeat_a_batch_and_minibatches_divide_it(tmp_path: Path, minibatches: int, rows: int) -> None:
    plan = Plan({"model": {"name": "toy"}, "objective": {"name": "toy", "minibatches": minibatches}}, {})
    run = made(tmp_path, objective=Imagining(), size=4, micro=4, plan=plan).run
    assert run.objective.steps_per_batch() == 3
    assert [batch.tokens.shape[0] for batch in longest(run)] == [rows]


def test_a_split_of_fewer_rows_than_a_step_has_repeats_them(tmp_path: Path) -> None:
    run = made(tmp_path, texts=TEXTS[:2], size=8, micro=8).run
    assert [batch.tokens.shape[0] for batch in longest(run)] == [8]


def test_a_step_that_fills_packed_rows_has_as_many_samples_as_fill_them(tmp_path: Path) -> None:
    run = made(tmp_path, size=1, micro=1).run
    run.settings.batch.sampler, run.settings.packing, run.settings.max_length = "packed", True, 24
    (batch,) = longest(run)
    lengths = sorted((len(text) + 1 for text in TEXTS), reverse=True)
    assert len(batch.sample_numbers) == 2
    assert int((batch.segments >= 0).sum()) == sum(lengths[:2]) == 24


def test_what_it_found_stands_in_a_file(tmp_path: Path) -> None:
    one = trained(tmp_path, dry="always", objective=Plain())
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found == {"dry_step": {"peak_bytes": None, "attempt": one.run.attempt}}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["accelerator", "host"],
)
def test_memory_that_lacks_is_the_users_to_mend(tmp_path: Path, error: Exception) -> None:
    def lacks(*_: Any) -> Any:
        raise error

    objective = Plain()
    objective.loss = lacks  # type: ignore[method-assign]
    with pytest.raises(UserError, match=re.escape(str(error).splitlines()[0])) as refused:
        trained(tmp_path, dry="always", objective=objective)
    (fault,) = refused.value.faults
    assert "rank 0" in fault.what and "more" not in fault.what
    for key in ("batch.micro", "sharding.activation_checkpointing", "adapter=lora", "more ranks"):
        assert key in fault.cure


def test_another_error_is_nobodys_to_hide(tmp_path: Path) -> None:
    def wrong(*_: Any) -> Any:
        raise RuntimeError("shapes differ")

    objective = Plain()
    objective.loss = wrong  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes differ"):
        trained(tmp_path, dry="always", objective=objective)


def test_state_of_optimizers_is_to_come_before_the_first_step_alone(tmp_path: Path) -> None:
    one = made(tmp_path)
    one.assembly.build_roles()
    assert state_to_come(one.run) == one.run.policy.engine.state_bytes() > 0
    one.run.step = 1
    assert state_to_come(one.run) == 0
