"""Layers that are cut over ranks give the curve of one process, and their checkpoints resume anywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loomtune import api
from loomtune.errors import UserError
from runs.curves import agree, largest
from runs.worlds import Outcome, Worlds

Train = Callable[..., Outcome]

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tensor 2": (2, ["sharding.tensor=2"]),
    "fsdp 2 x tensor 2": (4, ["sharding.tensor=2"]),
    "tensor 2, micro-batches of 1, recomputed": (
        2,
        ["sharding.tensor=2", "batch.micro=1", "sharding.activation_checkpointing=true"],
    ),
    "replicate 2 x tensor 2": (4, ["sharding.tensor=2", "sharding.replicate=2"]),
    "tensor 2, offloaded": (2, ["sharding.tensor=2", "sharding.offload=true"]),
    "tensor 2 x sequence 2": (4, ["sharding.tensor=2", "sharding.sequence=2"]),
}


def layouts(*everyday: str) -> pytest.MarkDecorator:
    """Those named in the everyday suite, all others behind `-m slow`."""
    rest = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name not in everyday]
    return pytest.mark.parametrize("layout", [*everyday, *rest])


@layouts("tensor 2", "fsdp 2 x tensor 2")
def test_cut_layers_give_the_curve_of_one_process(layout: str, train: Train, alone: Train, tiny: list[str]) -> None:
    size, how = LAYOUTS[layout]
    agree(train(size, [*tiny, "steps=40", "sharding=fsdp", *how]), alone(*tiny, "steps=40"))


@layouts()
def test_a_pretrained_model_learns_real_rows_alike(layout: str, train: Train, alone: Train, real: list[str]) -> None:
    size, how = LAYOUTS[layout]
    agree(train(size, [*real, "steps=40", "sharding=fsdp", *how]), alone(*real, "steps=40"))


@layouts()
def test_bf16_stays_near_bf16_on_one_process(layout: str, train: Train, alone: Train, tiny: list[str]) -> None:
    size, how = LAYOUTS[layout]
    settings = [*tiny, "steps=40", "precision=bf16"]
    found = train(size, [*settings, "sharding=fsdp", *how]).series("loss")
    assert largest(found, alone(*settings).series("loss")) < 5e-3


SEVERAL = ["sharding=fsdp", "sharding.tensor=2"]
MOVES: dict[str, list[tuple[int, list[str]]]] = {
    "to fsdp": [(2, SEVERAL), (2, ["sharding=fsdp"])],
    "to one process": [(2, SEVERAL), (1, ["sharding=single"])],
    "from fsdp": [(2, ["sharding=fsdp"]), (2, SEVERAL)],
    "from one process and to more": [(1, ["sharding=single"]), (2, SEVERAL), (4, SEVERAL), (2, ["sharding=ddp"])],
}


@pytest.mark.parametrize(
    "moves", [pytest.param(name, marks=[] if name == "to fsdp" else pytest.mark.slow) for name in MOVES]
)
def test_a_run_moves_to_cut_layers_and_back(
    moves: str, tiny: list[str], train: Train, alone: Train, worlds: Worlds
) -> None:
    (size, how), *others = MOVES[moves]
    moved = train(size, [*tiny, "steps=40"], *how, "stop_after=10")
    for number, (size, how) in enumerate(others, 2):
        end = [] if (size, how) == others[-1] else [f"stop_after={10 * number}"]
        moved = worlds.resume(size, moved.folder, *how, *end)
    assert moved.result["status"] == "completed"
    agree(moved, alone(*tiny, "steps=40"))


AHEAD: dict[str, tuple[int, list[str]]] = {
    "one block ahead": (2, ["sharding.prefetch=1"]),
    "more blocks than there are": (2, ["sharding.prefetch=5", "batch.micro=1"]),
    "kept in groups of 2": (4, ["sharding.reshard=2"]),
    "kept in groups of 2, two copies": (8, ["sharding.reshard=2", "sharding.replicate=2"]),
    "kept in groups of 2, one ahead": (4, ["sharding.reshard=2", "sharding.prefetch=1", "batch.micro=1"]),
}


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=[] if name == "one block ahead" else pytest.mark.slow) for name in AHEAD]
)
def test_when_parameters_are_gathered_changes_nothing(
    setting: str, tiny: list[str], train: Train, alone: Train
) -> None:
    size, how = AHEAD[setting]
    agree(train(size, [*tiny, "steps=40", "sharding=fsdp", *how]), alone(*tiny, "steps=40"))


def test_heads_that_cannot_be_dealt_out_are_refused_before_any_process_starts(tiny: list[str]) -> None:
    with pytest.raises(UserError, match="2 key and value heads cannot be dealt out to 4 ranks evenly") as error:
        api.check(api.compose([*tiny, "sharding=fsdp", "sharding.tensor=4"], processes=4))
    assert "set sharding.tensor=2" in str(error.value)


def test_an_adapter_around_linear_layers_is_refused_before_any_process_starts(tiny: list[str]) -> None:
    with pytest.raises(
        UserError, match="cuts linear layers, which adapter=lora puts modules of its own around"
    ) as error:
        api.check(api.compose([*tiny, "adapter=lora", "sharding=fsdp", "sharding.tensor=2"], processes=2))
    assert "set sharding.tensor=1" in str(error.value)
