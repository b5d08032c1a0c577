"""The maths never depends on the machine: one curve under every sharding, world size, micro-batch and memory saving."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runs.curves import agree, largest
from runs.worlds import Outcome, Worlds

EVERYDAY: dict[str, tuple[int, list[str]]] = {
    "ddp on 2": (2, ["sharding=ddp"]),
    "ddp on 3, micro-batches of 2": (3, ["sharding=ddp", "batch.micro=2"]),
    "fsdp on 2": (2, ["sharding=fsdp"]),
    "fsdp on 2, offloaded": (2, ["sharding=fsdp", "sharding.offload=true"]),
    "fsdp on 2, recomputed": (2, ["sharding=fsdp", "sharding.activation_checkpointing=true", "batch.micro=2"]),
    "fsdp on 3": (3, ["sharding=fsdp"]),
    "fsdp on 3, micro-batches of 1": (3, ["sharding=fsdp", "batch.micro=1"]),
    "hsdp on 2 x 2": (4, ["sharding=fsdp", "sharding.replicate=2"]),
    "micro-batches of 1": (1, ["sharding=single", "batch.micro=1"]),
    "micro-batches of 8": (1, ["sharding=single", "batch.micro=8"]),
}
SELDOM: dict[str, tuple[int, list[str]]] = {
    "ddp on 1": (1, ["sharding=ddp"]),
    "ddp on 3": (3, ["sharding=ddp"]),
    "fsdp on 1": (1, ["sharding=fsdp"]),
    "fsdp on 2, kept gathered": (2, ["sharding=fsdp", "sharding.reshard=false"]),
    "fsdp on 2, reduced each time": (2, ["sharding=fsdp", "sharding.accumulate_sharded=true", "batch.micro=1"]),
    "micro-batches of 2": (1, ["sharding=single", "batch.micro=2"]),
    "micro-batches of 4": (1, ["sharding=single", "batch.micro=4"]),
    "recomputed": (1, ["sharding=single", "sharding.activation_checkpointing=true"]),
    "ddp on 2, recomputed": (2, ["sharding=ddp", "sharding.activation_checkpointing=true"]),
}
LAYOUTS = EVERYDAY | SELDOM


def layouts(*everyday: str) -> pytest.MarkDecorator:
    """Those named in the everyday suite, all others behind `-m slow`."""
    rest = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name not in everyday]
    return pytest.mark.parametrize("layout", [*everyday, *rest])


LORA = ["adapter=lora", "adapter.rank=4"]
DROPOUT = [*LORA, "adapter.dropout=0.1"]

Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """The run on one process that others are compared with, made once for each set of settings."""
    made: dict[tuple[str, ...], Outcome] = {}

    def of(*settings: str) -> Outcome:
        if settings not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[settings] = worlds.train(1, [*settings, "sharding=single"], folder)
        return made[settings]

    return of


@layouts(*EVERYDAY)
def test_every_layout_gives_the_curve_of_one_process(layout: str, train: Train, alone: Train, tiny: list[str]) -> None:
    size, how = LAYOUTS[layout]
    agree(train(size, [*tiny, "steps=40", *how]), alone(*tiny, "steps=40"))


@layouts("ddp on 2", "fsdp on 3, micro-batches of 1", "fsdp on 2, recomputed")
def test_dropout_and_lora_draw_alike_in_every_layout(layout: str, train: Train, alone: Train, tiny: list[str]) -> None:
    size, how = LAYOUTS[layout]
    agree(train(size, [*tiny, *DROPOUT, "steps=40", *how]), alone(*tiny, *DROPOUT, "steps=40"))


def test_dropout_changes_the_curve(alone: Train, tiny: list[str]) -> None:
    with_it, without = alone(*tiny, *DROPOUT, "steps=40"), alone(*tiny, *LORA, "steps=40")
    assert largest(with_it.series("loss"), without.series("loss")) > 1e-3


@layouts("fsdp on 2")
def test_a_pretrained_model_learns_real_rows_alike(layout: str, train: Train, alone: Train, real: list[str]) -> None:
    size, how = LAYOUTS[layout]
    one = alone(*real, "steps=40")
    agree(train(size, [*real, "steps=40", *how]), one)
    losses = one.series("loss")
    assert losses[0] > 2 * sum(losses[-5:]) / 5


@layouts()
def test_a_pretrained_model_is_adapted_alike(layout: str, train: Train, alone: Train, real: list[str]) -> None:
    size, how = LAYOUTS[layout]
    agree(train(size, [*real, *DROPOUT, "steps=40", *how]), alone(*real, *DROPOUT, "steps=40"))


@layouts("ddp on 2", "fsdp on 2, recomputed")
def test_bf16_stays_near_bf16_on_one_process_and_near_fp32(
    layout: str, train: Train, alone: Train, tiny: list[str]
) -> None:
    size, how = LAYOUTS[layout]
    settings = (*tiny, "steps=40", "precision=bf16")
    found = train(size, [*settings, *how]).series("loss")
    assert largest(found, alone(*settings).series("loss")) < 5e-3
    assert 1e-6 < largest(found, alone(*tiny, "steps=40").series("loss")) < 2e-2
