"""Whole runs with a reference that is read once: the curve of a live one, in every layout and after resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins.objectives.dpo import Dpo
from loomtune_plugins.objectives.dpo_settings import DpoSettings
from loomtune_plugins.objectives.kto import Kto
from loomtune_plugins.objectives.kto_settings import KtoSettings
from runs.curves import largest
from runs.worlds import Outcome, Worlds
from support import write_rows

SAME = 1e-6
"""Relative, for losses and gradient norms."""

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, ["sharding=single"]),
    "unfolded": (1, ["sharding=single", "batch.share=never", "batch.micro=3"]),
    "shared": (1, ["sharding=single", "batch.share=always"]),
    "packed": (1, ["sharding=single", "packing=true"]),
    "ddp on 2": (2, ["sharding=ddp"]),
    "ddp, sequence 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp", "batch.micro=2"]),
    "fsdp, tensor 2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3"]),
}
EVERYDAY = ("single", "fsdp on 2")

HELD_OUT = ("heldout_loss", "heldout_rewards/margins", "heldout_rewards/accuracies")


@pytest.fixture(scope="module")
def tiny(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = [
        {"prompt": "p" * (3 + i % 5), "chosen": "ab" * (1 + i % 7), "rejected": "c" * (2 + i % 6) + chr(97 + i % 26)}
        for i in range(38)
    ]
    path = write_rows(tmp_path_factory.mktemp("pairs") / "rows.jsonl", rows)
    data = [f"model.path={tied_model}", "data=jsonl", f"data.path={path}", "data.holdout_rows=6"]
    learned = ["objective=dpo", "optimizer.lr=1e-3", "steps=5", "evaluator=[heldout]"]
    return [*data, *learned, "tracker=[jsonl]", "checkpoint.background=false"]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache that holds nothing yet. Ranks find it by what was prepared in it."""
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


Trained = Callable[..., Outcome]


@pytest.fixture
def trained(worlds: Worlds, tiny: list[str], tmp_path: Path, cache: Path) -> Trained:
    def of(size: int, *settings: str, name: str = "run") -> Outcome:
        return worlds.train(size, [*tiny, *settings], tmp_path / name)

    return of


def same(one: Outcome, other: Outcome) -> None:
    for name in ("loss", "grad_norm"):
        assert largest(one.series(name), other.series(name)) < SAME, name
    for name in HELD_OUT:
        assert one.result["metrics"][name] == pytest.approx(other.result["metrics"][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow) for name in LAYOUTS]
)
@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_stored_is_live(layout: str, adapter: str, trained: Trained, cache: Path) -> None:
    if adapter == "lora" and "tensor" in layout:
        pytest.skip("linear layers that are wrapped are not cut")
    size, how = LAYOUTS[layout]
    stored = trained(size, *how, f"adapter={adapter}", "objective.reference=stored", name="stored")
    assert len(list(cache.glob("records/*/000000"))) == 2, "training rows and those held out"
    same(stored, trained(size, *how, f"adapter={adapter}", "objective.reference=live", name="live"))


@pytest.mark.slow
def test_one_record_serves_every_layout(trained: Trained, cache: Path) -> None:
    stored = ["objective.reference=stored"]
    one = trained(2, *stored, "sharding=fsdp", name="one")
    made = {path: path.stat().st_mtime_ns for path in cache.glob("records/*/*")}
    same(trained(1, *stored, "sharding=single", name="other"), one)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("records/*/*")} == made


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["with the record", "with another machine's cache"])
def test_a_run_resumes_under_another_layout(kept: bool, trained: Trained, worlds: Worlds, cache: Path) -> None:
    stored = ["objective.reference=stored", "sharding=ddp"]
    whole = trained(2, *stored, name="whole")
    half = trained(2, *stored, "stop_after=2", name="half")
    assert half.result["status"] == "stopped"
    if not kept:
        shutil.rmtree(cache)
    resumed = worlds.resume(1, half.folder, "sharding=single")
    assert [line["step"] for line in resumed.lines] == [1, 2, 3, 4, 5]
    same(resumed, whole)
    assert bool(list(cache.glob("records/*/000000")))


def test_a_resumed_run_makes_a_lost_record_again_from_the_weights_that_it_began_with(
    trained: Trained, worlds: Worlds, cache: Path
) -> None:
    stored = ["objective.reference=stored", "sharding=single"]
    whole, half = trained(1, *stored, name="whole"), trained(1, *stored, "stop_after=2", name="half")
    shutil.rmtree(cache)
    same(worlds.resume(1, half.folder), whole)


def test_evaluating_a_checkpoint_compares_it_with_what_the_run_began_as(trained: Trained, cache: Path) -> None:
    run = trained(1, "objective.reference=stored", "sharding=single")
    shutil.rmtree(cache / "records")
    found = api.evaluate(run.folder)
    for name in HELD_OUT:
        assert found[name] == pytest.approx(run.result["metrics"][name], rel=1e-5, abs=1e-6), name
    assert len(list(cache.glob("records/*"))) == 1, "of the rows that are measured on alone"


def test_kto_without_answers_to_other_prompts_stores_too(
    worlds: Worlds, tied_model: Path, tmp_path: Path, cache: Path
) -> None:
    rows = [{"prompt": "p" * (3 + i % 5), "completion": "ab" * (1 + i % 7), "label": i % 3 > 0} for i in range(20)]
    given = [f"model.path={tied_model}", "data=jsonl", f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}"]
    given += ["objective=kto", "objective.variant=apo_zero_unpaired", "optimizer.lr=1e-3", "steps=4", "tracker=[jsonl]"]
    given += ["sharding=single", "data.holdout_rows=4", "evaluator=[heldout]", "checkpoint.background=false"]
    live, stored = (worlds.train(1, [*given, f"objective.reference={how}"], tmp_path / how) for how in ("live", "auto"))
    assert list(cache.glob("records/*/000000"))
    for name in ("loss", "grad_norm"):
        assert largest(stored.series(name), live.series(name)) < SAME, name
    assert stored.result["metrics"]["heldout_loss"] == pytest.approx(live.result["metrics"]["heldout_loss"], rel=1e-6)


def test_kto_that_meets_answers_to_other_prompts_reads_the_reference_in_each_step() -> None:
    assert not Kto(KtoSettings()).records()
    with pytest.raises(UserError, match=r"reference=stored does not go with objective\.variant=kto"):
        Kto(KtoSettings(reference="stored"))


def test_a_loss_of_whole_distributions_reads_the_reference_in_each_step() -> None:
    from loomtune.testing.recorded import built

    assert not built("dpo", {"loss_type": ["sigmoid", "kl"]}).records()
    assert built("dpo", {}).records()
    with pytest.raises(UserError, match="one number"):
        built("dpo", {"loss_type": ["sigmoid", "kl"], "reference": "stored"})


@pytest.mark.parametrize("make", [lambda: Dpo(DpoSettings(reference="kept")), lambda: Kto(KtoSettings(reference="x"))])
def test_another_word_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=r"objective\.reference=.*not known"):
        make()
