"""Whole runs with a KL to the reference: one curve in every layout, and a policy that is held where it began."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runs.curves import agree
from runs.worlds import Outcome, Worlds
from support import write_rows

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "unfolded, micro-batches of 3": (1, ["sharding=single", "batch.micro=3", "batch.share=never"]),
    "shared and packed": (1, ["sharding=single", "packing=true", "batch.share=always"]),
    "ddp on 2": (2, ["sharding=ddp"]),
    "ddp, sequence 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp", "batch.micro=2"]),
    "fsdp, tensor 2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "fsdp on 2, recomputed": (2, ["sharding=fsdp", "sharding.activation_checkpointing=true"]),
    "zero 2 on 2": (2, ["sharding=zero", "sharding.stage=2"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3", "batch.micro=2"]),
}
ADAPTERS = {"full": ["adapter=full"], "lora": ["adapter=lora", "adapter.rank=4", "adapter.targets=[lm_head,q_proj]"]}
EVERYDAY = [("fsdp on 2", "lora"), ("zero 3 on 2", "full")]
CASES = [
    pytest.param(layout, adapter, marks=() if (layout, adapter) in EVERYDAY else pytest.mark.slow)
    for layout in LAYOUTS
    for adapter in ADAPTERS
]


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = [
        {"prompt": f"{word} ", "chosen": f"weaves {word}", "rejected": f"{word} and warp and weft"[: 8 + i]}
        for i, word in enumerate(["a loom", "thread", "cloth", "the shuttle", "silk", "a weaver", "wool", "yarn"])
    ]
    data = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_rows(data, rows)
    return [
        *(f"model.path={tiny_model}", "data=jsonl", f"data.path={data}", "objective=dpo", "steps=4", "batch.size=4"),
        *("loss=[sigmoid,kl]", "optimizer.lr=1e-2", "tracker=[jsonl]"),
        "checkpoint.background=false",
    ]


@pytest.fixture(scope="module")
def alone(worlds: Worlds, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    made: dict[tuple[str, ...], Outcome] = {}

    def of(*more: str, weight: float = 0.5) -> Outcome:
        more = (*more, f"loss.kl.weight={weight}")
        if more not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[more] = worlds.train(1, [*settings, *more, "sharding=single"], folder)
        return made[more]

    return of


@pytest.mark.parametrize(("layout", "adapter"), CASES)
def test_one_curve_in_every_layout(
    layout: str, adapter: str, worlds: Worlds, alone: Callable[..., Outcome], settings: list[str], tmp_path: Path
) -> None:
    if adapter == "lora" and "tensor" in layout:
        pytest.skip("linear layers that are wrapped are not cut")
    size, how = LAYOUTS[layout]
    one = alone(*ADAPTERS[adapter])
    other = worlds.train(size, [*settings, *ADAPTERS[adapter], *how, "loss.kl.weight=0.5"], tmp_path / "run")
    agree(other, one)
    assert one.series("kl")[0] == pytest.approx(0, abs=1e-6) and one.series("kl")[-1] > 1e-4
    assert other.series("kl")[1:] == pytest.approx(one.series("kl")[1:], rel=1e-4)


@pytest.mark.slow
def test_its_weight_holds_the_policy_near_its_reference(alone: Callable[..., Outcome]) -> None:
    free, held = (alone(*ADAPTERS["lora"], weight=weight).series("kl")[-1] for weight in (0, 20))
    assert held < 0.5 * free


def test_an_adapter_of_the_head_is_off_where_the_reference_is_read(alone: Callable[..., Outcome]) -> None:
    """Full fine-tuning has a reference of its own; an adapter of the head alone has only the head to switch."""
    head = ["adapter=lora", "adapter.rank=4", "adapter.targets=[lm_head]"]
    assert alone(*head, weight=0).series("kl")[-1] > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("layout", ["fsdp on 2", "zero 3 on 2"])
def test_it_holds_supervised_fine_tuning_too(
    layout: str, adapter: str, worlds: Worlds, tied_model: Path, mixed_data: Path, tmp_path: Path
) -> None:
    run = [
        *(f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", "loss=[kl]", "loss.kl.weight=0.5"),
        *("optimizer.lr=1e-2", "steps=4", "batch.size=4", "tracker=[jsonl]", "checkpoint.background=false"),
        *(text.replace("lm_head,", "") for text in ADAPTERS[adapter]),
    ]
    size, how = LAYOUTS[layout]
    one = worlds.train(1, [*run, "sharding=single"], tmp_path / "alone")
    agree(worlds.train(size, [*run, *how], tmp_path / "run"), one)
    assert one.series("kl")[-1] > 1e-4
