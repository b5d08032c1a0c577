"""The maths never depends on the machine: one curve under every sharding, world size, micro-batch and memory saving."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import parity
from parity import Cell, Layout, Row
from runs.curves import agree, largest
from runs.worlds import Outcome

# Those that other tests of the everyday suite run anyway are not among these.
EVERYDAY: dict[str, tuple[int, list[str]]] = {
    "ddp on 3, micro-batches of 2": (3, ["sharding=ddp", "batch.micro=2"]),
    "fsdp on 2, offloaded": (2, ["sharding=fsdp", "sharding.offload=true"]),
    "fsdp on 2, recomputed": (2, ["sharding=fsdp", "sharding.activation_checkpointing=true", "batch.micro=2"]),
    "fsdp on 3, micro-batches of 1": (3, ["sharding=fsdp", "batch.micro=1"]),
    "hsdp on 2 x 2": (4, ["sharding=fsdp", "sharding.replicate=2"]),
    "micro-batches of 1": (1, ["sharding=single", "batch.micro=1"]),
    "micro-batches of 8": (1, ["sharding=single", "batch.micro=8"]),
    "fsdp on 3, packed, micro-batches of 1": (3, ["sharding=fsdp", "packing=true", "batch.micro=1"]),
    "fsdp, sequence 2, packed": (2, ["sharding=fsdp", "sharding.sequence=2", "packing=true"]),
    "fsdp, tensor 2, packed": (2, ["sharding=fsdp", "sharding.tensor=2", "packing=true"]),
    "zero 3 on 2, packed": (2, ["sharding=zero", "sharding.stage=3", "packing=true"]),
}
SELDOM: dict[str, tuple[int, list[str]]] = {
    "ddp on 2": (2, ["sharding=ddp"]),
    "fsdp on 2": (2, ["sharding=fsdp"]),
    "fsdp on 3": (3, ["sharding=fsdp"]),
    "packed": (1, ["sharding=single", "packing=true"]),
    "ddp on 2, packed": (2, ["sharding=ddp", "packing=true"]),
    "ddp on 1": (1, ["sharding=ddp"]),
    "ddp on 3": (3, ["sharding=ddp"]),
    "fsdp on 1": (1, ["sharding=fsdp"]),
    "fsdp on 2, kept gathered": (2, ["sharding=fsdp", "sharding.reshard=false"]),
    "fsdp on 2, reduced once": (2, ["sharding=fsdp", "sharding.accumulate_sharded=false", "batch.micro=1"]),
    "hsdp on 2 x 2, micro-batches of 1": (4, ["sharding=fsdp", "sharding.replicate=2", "batch.micro=1"]),
    "micro-batches of 2": (1, ["sharding=single", "batch.micro=2"]),
    "micro-batches of 4": (1, ["sharding=single", "batch.micro=4"]),
    "packed, micro-batches of 1": (1, ["sharding=single", "packing=true", "batch.micro=1"]),
    "packed, micro-batches of 8": (1, ["sharding=single", "packing=true", "batch.micro=8"]),
    "hsdp on 2 x 2, packed": (4, ["sharding=fsdp", "sharding.replicate=2", "packing=true"]),
    "zero 2 on 2, packed": (2, ["sharding=zero", "sharding.stage=2", "packing=true", "batch.micro=1"]),
    "recomputed": (1, ["sharding=single", "sharding.activation_checkpointing=true"]),
    "ddp on 2, recomputed": (2, ["sharding=ddp", "sharding.activation_checkpointing=true"]),
}
LAYOUTS = EVERYDAY | SELDOM


def laid_out(layout: str) -> tuple[int, list[str]]:
    """(processes, settings) of a layout; skips the test where the catalogue has not got it."""
    size, how = LAYOUTS[layout]
    if reason := parity.lacking(" ".join(text for text in how if text.startswith("sharding"))):
        pytest.skip(reason)
    return size, how


def layouts(*everyday: str) -> pytest.MarkDecorator:
    """Those named in the everyday suite, all others behind `-m slow`."""
    rest = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name not in everyday]
    return pytest.mark.parametrize("layout", [*everyday, *rest])


LORA = ["adapter=lora", "adapter.rank=4"]
DROPOUT = [*LORA, "adapter.dropout=0.1"]

Train = Callable[..., Outcome]


@layouts(*EVERYDAY)
def test_every_layout_gives_the_curve_of_one_process(layout: str, train: Train, alone: Train, tiny: list[str]) -> None:
    size, how = laid_out(layout)
    agree(train(size, [*tiny, "steps=40", *how]), alone(*tiny, "steps=40"))


@layouts("ddp on 2", "fsdp on 3, micro-batches of 1", "fsdp on 2, recomputed", "ddp on 2, packed")
def test_dropout_and_lora_draw_alike_in_every_layout(layout: str, train: Train, alone: Train, tiny: list[str]) -> None:
    size, how = laid_out(layout)
    agree(train(size, [*tiny, *DROPOUT, "steps=40", *how]), alone(*tiny, *DROPOUT, "steps=40"))


def test_dropout_changes_the_curve(alone: Train, tiny: list[str]) -> None:
    with_it, without = alone(*tiny, *DROPOUT, "steps=40"), alone(*tiny, *LORA, "steps=40")
    assert largest(with_it.series("loss"), without.series("loss")) > 1e-3


@layouts("fsdp on 2")
def test_a_pretrained_model_learns_real_rows_alike(layout: str, train: Train, alone: Train, real: list[str]) -> None:
    size, how = laid_out(layout)
    one = alone(*real, "steps=40")
    agree(train(size, [*real, "steps=40", *how]), one)
    losses = one.series("loss")
    assert losses[0] > 2 * sum(losses[-5:]) / 5


@layouts()
def test_a_pretrained_model_is_adapted_alike(layout: str, train: Train, alone: Train, real: list[str]) -> None:
    size, how = laid_out(layout)
    agree(train(size, [*real, *DROPOUT, "steps=40", *how]), alone(*real, *DROPOUT, "steps=40"))


@layouts("fsdp on 2, recomputed")
def test_bf16_stays_near_bf16_on_one_process_and_near_fp32(
    layout: str, train: Train, alone: Train, tiny: list[str]
) -> None:
    size, how = laid_out(layout)
    settings = (*tiny, "steps=40", "precision=bf16")
    found = train(size, [*settings, *how]).series("loss")
    assert largest(found, alone(*settings).series("loss")) < 5e-3
    assert 1e-6 < largest(found, alone(*tiny, "steps=40").series("loss")) < 2e-2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("sharding=fsdp sharding.replicate=2", ""),
        ("sharding=single", ""),
        ("sharding=warped sharding.stage=1", "there is no sharding warped"),
        ("sharding=ddp sharding.warp=2", "ddp has no sharding.warp"),
    ],
)
def test_what_the_catalogue_has_not_got_is_said(settings: str, reason: str) -> None:
    assert parity.lacking(settings) == reason


def test_the_sample_meets_every_layout_and_the_product_every_combination() -> None:
    assert {cell.layout for cell in parity.sample()} == set(parity.LAYOUTS)
    assert {(cell.micro, cell.packing) for cell in parity.sample()} >= {("1", True), ("auto", True), ("all", False)}
    assert set(parity.sample()) <= set(parity.product())
    assert len(parity.product()) == len(set(parity.product())) == 6 * sum(len(one.worlds) for one in parity.LAYOUTS)


def test_a_curve_beyond_a_bound_is_told(alone: Train, tiny: list[str]) -> None:
    one, other = alone(*tiny, "steps=40"), alone(*tiny, *LORA, "steps=40")
    cell = Cell(Layout("mine", (1,), "sharding=single"), 1)
    assert parity.compared(parity.SFT, cell, one, one, "fp32") == Row(cell, 0.0, 0.0)
    found = parity.compared(parity.SFT, cell, other, one, "fp32")
    assert found.wrong and found.loss is not None and found.loss > 1e-3
    assert parity.line(found)[-1] == "EXCEEDED"
    assert "| mine | 1 | auto | off | " in parity.section(parity.SFT, [found], "fp32", "make parity")
