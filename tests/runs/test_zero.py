"""ZeRO: one curve with every other way, and checkpoints that any way reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest

from runs.curves import agree, largest
from runs.worlds import Outcome, Worlds
from support import SHAPE, byte_tokenizer

Train = Callable[..., Outcome]

GATHERING = "sharding.persist=0"
"""No parameter is so small that stage 3 keeps it whole."""
STAGES: dict[str, list[str]] = {
    "stage 1": ["sharding.stage=1"],
    "stage 2": ["sharding.stage=2"],
    "stage 3": ["sharding.stage=3", GATHERING],
    "stage 1, offloaded": ["sharding.stage=1", "sharding.offload=optimizer"],
    "stage 2, offloaded": ["sharding.stage=2", "sharding.offload=optimizer"],
    "stage 3, small ones whole": ["sharding.stage=3"],
    "stage 3, state offloaded": ["sharding.stage=3", GATHERING, "sharding.offload=optimizer"],
    "stage 3, all offloaded": ["sharding.stage=3", GATHERING, "sharding.offload=all"],
    "stage 3, recomputed": ["sharding.stage=3", GATHERING, "sharding.activation_checkpointing=true"],
}
LORA = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.1"]


def zero(stage: str) -> list[str]:
    return ["sharding=zero", *STAGES[stage]]


def everyday(names: str, all_of_them: Iterable[tuple[Any, ...]], *chosen: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Those chosen in the everyday suite, all others behind `-m slow`."""
    rest = [pytest.param(*one, marks=pytest.mark.slow) for one in all_of_them if one not in chosen]
    return pytest.mark.parametrize(names.split(","), [*chosen, *rest])


@everyday("stage,micro", product(STAGES, ["1", "8"]), ("stage 1", "1"), ("stage 3", "8"))
def test_every_stage_gives_the_curve_of_one_process(
    stage: str, micro: str, train: Train, alone: Train, tiny: list[str]
) -> None:
    settings = [*tiny, "steps=40"]
    agree(train(2, settings, *zero(stage), f"batch.micro={micro}"), alone(*settings))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> list[str]:
    """Settings of a run of a model whose tensors no number of ranks divides: its width is 35."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("odd")
    shape = {**SHAPE, "hidden_size": 35, "intermediate_size": 63, "head_dim": 6, "num_attention_heads": 5}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = LlamaConfig(**{**shape, "num_key_value_heads": 1}, tie_word_embeddings=False)
        LlamaForCausalLM(config).save_pretrained(folder)
    return [f"model.path={byte_tokenizer(folder)}", *tiny[1:]]


@everyday("stage,size", product(["stage 1", "stage 2", "stage 3", "stage 3, all offloaded"], [2, 3, 4]), ("stage 3", 3))
def test_sizes_that_no_world_divides_are_cut_all_the_same(
    stage: str, size: int, odd: list[str], train: Train, alone: Train
) -> None:
    agree(train(size, [*odd, "steps=10"], *zero(stage)), alone(*odd, "steps=10"))


@everyday("stage", product(STAGES), ("stage 2",))
def test_dropout_and_lora_draw_alike_in_every_stage(stage: str, train: Train, alone: Train, tiny: list[str]) -> None:
    settings = [*tiny, *LORA, "steps=40"]
    agree(train(2, settings, *zero(stage), "batch.micro=2"), alone(*settings))


@everyday("stage", product(STAGES), ("stage 1",))
def test_bf16_stays_near_bf16_on_one_process_and_near_fp32(
    stage: str, train: Train, alone: Train, tiny: list[str]
) -> None:
    settings = (*tiny, "steps=40", "precision=bf16")
    found = train(2, [*settings, *zero(stage)]).series("loss")
    near, exact = alone(*settings).series("loss"), alone(*tiny, "steps=40").series("loss")
    assert largest(found, near) < 5e-3
    assert 1e-6 < largest(found, exact) < 2e-2


MOVES = {
    "down the stages": [(1, ["sharding=single"]), (2, zero("stage 3")), (3, zero("stage 2")), (2, zero("stage 1"))],
    "to and fro": [(2, zero("stage 1")), (2, ["sharding=fsdp"]), (4, zero("stage 3")), (1, ["sharding=single"])],
    "to more ranks": [(2, zero("stage 3, all offloaded")), (4, zero("stage 3")), (1, zero("stage 3"))],
    "with offload": [(2, zero("stage 2, offloaded")), (4, zero("stage 2, offloaded")), (2, ["sharding=ddp"])],
}


@everyday("moves,adapter", product(MOVES, ["full", "lora"]), ("to and fro", "full"))
def test_a_run_moves_between_layouts_and_keeps_its_curve(
    moves: str, adapter: str, tiny: list[str], train: Train, alone: Train, worlds: Worlds
) -> None:
    settings, (first, *others) = [*tiny, *(LORA if adapter == "lora" else []), "steps=20"], MOVES[moves]
    moved = train(first[0], settings, *first[1], "stop_after=5")
    for number, (size, how) in enumerate(others, 2):
        rest = [] if number == len(MOVES[moves]) else [f"stop_after={5 * number}"]
        moved = worlds.resume(size, moved.folder, *how, *rest)
    assert moved.result["status"] == "completed"
    agree(moved, alone(*settings))


@everyday("stage", product(["stage 1", "stage 2", "stage 3", "stage 3, all offloaded"]), ("stage 3",))
def test_a_resumed_run_goes_on_to_the_bit(stage: str, odd: list[str], train: Train, worlds: Worlds) -> None:
    settings = [*odd, *zero(stage), "steps=12", "precision=bf16"]
    stopped = train(3, settings, "stop_after=6", folder="stopped")
    assert worlds.resume(3, stopped.folder).lines == train(3, settings, folder="still").lines


@everyday("stage", product(["stage 2", "stage 3", "stage 3, small ones whole"]), ("stage 3",))
def test_an_evaluation_leaves_no_trace_in_training(stage: str, tiny: list[str], train: Train) -> None:
    settings = [*tiny, *LORA, *zero(stage), "steps=8", "data.holdout_rows=5"]
    measured = train(2, settings, "evaluator=[heldout]", "evaluate.every=2", "evaluate.before=true", folder="measured")
    assert [line["step"] for line in measured.lines if "heldout_loss" in line] == [2, 4, 6, 8]
    training = [{k: v for k, v in line.items() if not k.startswith("heldout")} for line in measured.lines]
    assert [line for line in training if line["step"]] == train(2, settings, folder="without").lines
