"""Virtual tokens and prefixes are learned alike in every layout, and go on under another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from loomtune import api, checkpoint
from loomtune.errors import UserError
from runs.continuing import COUNT, PROMPTS, continued
from runs.curves import largest
from runs.worlds import Outcome, Worlds
from support import mixed_rows, write_rows

STEPS = "steps=8"
METHODS = {
    "prompt": ["adapter=prompt", "adapter.length=4", "adapter.init=text", "adapter.text='loom and weft'"],
    "ptuning": ["adapter=ptuning", "adapter.length=4"],
    "prefix": ["adapter=prefix", "adapter.length=4"],
    "projected prefix": ["adapter=prefix", "adapter.length=4", "adapter.projection=true"],
}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "micro-batches of 1": (1, ["sharding=single", "batch.micro=1"]),
    "packed, recomputed": (1, ["sharding=single", "sharding.activation_checkpointing=true", "packing=true"]),
    "ddp on 2": (2, ["sharding=ddp"]),
    "ddp on 3, micro-batches of 1": (3, ["sharding=ddp", "batch.micro=1"]),
    "fsdp on 2": (2, ["sharding=fsdp"]),
    "fsdp on 2, recomputed": (2, ["sharding=fsdp", "sharding.activation_checkpointing=true", "batch.micro=2"]),
    "fsdp on 3, micro-batches of 1": (3, ["sharding=fsdp", "batch.micro=1"]),
    "zero 2 on 2": (2, ["sharding=zero", "sharding.stage=2"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3", "batch.micro=2"]),
    "zero 3 on 2, recomputed, packed": (
        2,
        ["sharding=zero", "sharding.stage=3", "sharding.activation_checkpointing=true", "packing=true"],
    ),
}


def on(layout: str, method: str) -> tuple[int, list[str]]:
    """Processes and settings of a layout; a prefix needs rows that hold one sample each."""
    size, how = LAYOUTS[layout]
    return size, [text for text in how if "prefix" not in method or text != "packing=true"]


EVERYDAY = [("prompt", "fsdp on 2, recomputed"), ("prefix", "ddp on 3, micro-batches of 1")]
CELLS = [
    pytest.param(method, layout, marks=() if (method, layout) in EVERYDAY else pytest.mark.slow)
    for method in METHODS
    for layout in LAYOUTS
]

Train = Callable[..., Outcome]


@pytest.fixture
def settings(tiny: list[str]) -> list[str]:
    """Of a run at a rate at which virtual tokens learn."""
    return [text for text in tiny if not text.startswith("optimizer.lr=")] + ["optimizer.lr=0.03", STEPS]


@pytest.mark.parametrize(("method", "layout"), CELLS)
def test_every_layout_gives_the_curve_of_one_process(
    method: str, layout: str, train: Train, alone: Train, settings: list[str]
) -> None:
    size, how = on(layout, method)
    one = alone(*settings, *METHODS[method])
    agree(train(size, [*settings, *METHODS[method], *how]), one)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["fsdp on 2, recomputed", "zero 3 on 2"])
def test_bf16_stays_near_bf16_on_one_process_and_near_fp32(
    method: str, layout: str, train: Train, alone: Train, settings: list[str]
) -> None:
    size, how = on(layout, method)
    losses = train(size, [*settings, *METHODS[method], "precision=bf16", *how]).series("loss")
    assert largest(losses, alone(*settings, *METHODS[method], "precision=bf16").series("loss")) < 5e-3
    assert 1e-6 < largest(losses, alone(*settings, *METHODS[method]).series("loss")) < 2e-2


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run on pairs of answers, with the adapter off for a reference."""
    rows = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["prompt"][:9]} for row in mixed_rows(48)
    ]
    path = write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)
    return ["objective=dpo", f"data.path={path}"]


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        pytest.param(method, layout, marks=() if (method, layout) == ("prompt", "fsdp on 2") else pytest.mark.slow)
        for method in METHODS
        for layout in ("micro-batches of 1", "packed, recomputed", "fsdp on 2", "zero 3 on 2")
    ],
)
def test_pairs_that_share_a_prompt_are_learned_as_pairs_that_do_not(
    method: str, layout: str, train: Train, alone: Train, settings: list[str], preferences: list[str]
) -> None:
    size, how = on(layout, method)
    kept = [text for text in settings if not text.startswith("data.path=")]
    one = alone(*kept, *preferences, *METHODS[method], "batch.share=never")
    agree(train(size, [*kept, *preferences, *METHODS[method], "batch.share=always", *how]), one)


@pytest.mark.parametrize(
    ("method", "first", "then"),
    [
        pytest.param("ptuning", "fsdp on 2", "micro-batches of 1"),
        *(
            pytest.param(method, first, then, marks=pytest.mark.slow)
            for method in METHODS
            for first, then in (("zero 3 on 2", "fsdp on 3, micro-batches of 1"), ("ddp on 2", "zero 2 on 2"))
        ),
    ],
)
def test_a_run_goes_on_under_another_layout(
    method: str, first: str, then: str, worlds: Worlds, alone: Train, settings: list[str], tmp_path: Path
) -> None:
    (size, how), (next_size, next_how) = on(first, method), on(then, method)
    folder = tmp_path / "run"
    worlds.train(size, [*settings, *METHODS[method], *how, "stop_after=4"], folder)
    agree(worlds.resume(next_size, folder, *next_how), alone(*settings, *METHODS[method]))


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        pytest.param(method, layout, marks=() if (method, layout) == ("prefix", "fsdp on 2") else pytest.mark.slow)
        for method in METHODS
        for layout in ("packed, recomputed", "ddp on 2", "fsdp on 2", "zero 2 on 2", "zero 3 on 2")
    ],
)
def test_what_a_layout_has_learned_goes_on_as_in_peft(
    method: str, layout: str, worlds: Worlds, settings: list[str], tied_model: Path, tmp_path: Path
) -> None:
    size, how = on(layout, method)
    ran = worlds.train(
        size, [*settings, *METHODS[method], *how, "rollout=huggingface"], tmp_path / "run", work=continued
    )
    last = checkpoint.latest(ran.folder / "checkpoints")
    assert last is not None
    base = LlamaForCausalLM.from_pretrained(tied_model)
    theirs = PeftModel.from_pretrained(base, last / "adapter").eval()
    how_long = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, drawn in zip(PROMPTS, ran.result["drawn"], strict=True):
        ids = torch.tensor([prompt])
        made = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how_long)
        assert drawn == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (["sharding=ddp", "sharding.sequence=2"], "sharding.sequence=2 cuts rows"),
        (["sharding=fsdp", "sharding.tensor=2"], "sharding.tensor=2 cuts the heads"),
    ],
    ids=["sequence", "tensor"],
)
def test_what_cuts_rows_or_heads_is_refused(method: str, how: list[str], reason: str, settings: list[str]) -> None:
    with pytest.raises(UserError, match=reason):
        api.check(api.compose([*settings, *METHODS[method], *how], processes=2))


def agree(one: Outcome, other: Outcome) -> None:
    """Both learned from the same tokens, alike."""
    assert one.series("tokens") == other.series("tokens")
    assert largest(one.series("loss"), other.series("loss")) < 5e-6
    assert largest(one.series("grad_norm"), other.series("grad_norm")) < 1e-5
