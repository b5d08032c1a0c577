"""Online DPO gives one curve under every strategy and world size, and goes on in the middle of a batch's epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runs.curves import largest
from runs.scoring import LORA
from runs.worlds import Outcome, Worlds
from support import write_rows

Train = Callable[..., Outcome]

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "ddp on 2": (2, ["sharding=ddp", "batch.micro=1"]),
    "fsdp on 2, packed": (2, ["sharding=fsdp", "packing=true"]),
    "zero-3 on 2": (2, ["sharding=zero", "sharding.stage=3", "sharding.persist=0"]),
    "ddp on 3": (3, ["sharding=ddp"]),
    "single, apart": (1, ["sharding=single", "batch.share=never", "batch.micro=2"]),
}
QUICK = ("ddp on 2", "single, apart")


@pytest.fixture(scope="module")
def preferring(tied_model: Path, liking: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five prompts a batch, of which the reward model's own network is the policy's."""
    rows = [{"prompt": f"loom {n}" + "!" * (n % 4)} for n in range(20)]
    path = write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)
    data = ["data=jsonl", f"data.path={path}", f"model.path={tied_model}", "tracker=[jsonl]", "batch.size=5"]
    objective = ["objective=online_dpo", "objective.group=3", "objective.max_new_tokens=6", "rollout=huggingface"]
    reward = ["reward=[model]", f"reward.model.adapter={liking}", "checkpoint.background=false"]
    return [*data, *LORA, *objective, *reward, "objective.epochs=2", "objective.minibatches=2", "optimizer.lr=1e-3"]


@pytest.mark.parametrize(
    "layout", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_one_curve(layout: str, train: Train, alone: Train, preferring: list[str]) -> None:
    size, how = LAYOUTS[layout]
    found, exact = train(size, [*preferring, "steps=8"], *how), alone(*preferring, "steps=8")
    assert found.series("pairs/share") == exact.series("pairs/share"), "the same pairs"
    assert found.series("tokens") == exact.series("tokens")
    assert largest(found.series("loss"), exact.series("loss")) < 1e-5
    assert largest(found.series("grad_norm"), exact.series("grad_norm")) < 1e-4
    assert exact.lines[0]["kl"] == pytest.approx(0, abs=1e-6) and exact.lines[1]["kl"] != 0
    assert len(exact.series("rewards/mean")) == 2, "two batches of completions"


def test_a_run_that_left_between_two_epochs_goes_on_as_if_it_had_not(
    worlds: Worlds, alone: Train, preferring: list[str], tmp_path: Path
) -> None:
    exact = alone(*preferring, "steps=8")
    worlds.train(2, [*preferring, "steps=8", "sharding=ddp", "stop_after=3"], tmp_path / "run")
    found = worlds.resume(1, tmp_path / "run", "sharding=single")
    for name in ("loss", "grad_norm"):
        assert largest(found.series(name), exact.series(name)) < 1e-4, name
    assert found.series("pairs/share") == exact.series("pairs/share")
