"""What a rehearsal says of an accelerator's memory, against what torch's allocator counts on one, in 8B shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runs.allocating import measure_device
from runs.foretelling import foretold
from runs.worlds import Worlds
from support import write_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator is here"),
]

BOUND = 0.05
LENGTH, ROWS = 4096, 2
HARDWARE = "h100_80gb"
"""Any accelerator by CUDA: which one changes no memory."""

SETTINGS = ("model=llama3_8b", "sharding=single", "precision=bf16", f"max_length={LENGTH}", f"batch.size={ROWS}")
QUIET = ("tracker=[]", "evaluator=[]", "guard=[]", "exporter=[]", "dry_step=never", "checkpoint.background=false")
RECOMPUTED = "sharding.activation_checkpointing=true"
LINES = {
    "LoRA, one row at once": ("adapter=lora", "batch.micro=1"),
    "LoRA, recomputed": ("adapter=lora", RECOMPUTED, f"batch.micro={ROWS}"),
    "QLoRA, recomputed": ("adapter=qlora", RECOMPUTED, f"batch.micro={ROWS}"),
    "full, SGD, recomputed": ("optimizer=sgd", RECOMPUTED, "batch.micro=1"),
    "full, AdamW, 8 of 32 blocks": ("model.shape.num_hidden_layers=8", "batch.micro=1"),
}
NEEDED = {"full, SGD, recomputed": 76}
"""GiB that lines take; of others 60 are enough."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "long.jsonl"
    return write_rows(path, [{"prompt": "w " * 40, "completion": "weft " * LENGTH} for _ in range(ROWS)])


@pytest.mark.parametrize("line", LINES)
def test_the_peak_on_an_accelerator_is_foretold(line: str, rows: Path, worlds: Worlds, tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED.get(line, 60) * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB are free")
    data = ["data=jsonl", f"data.path={rows}", "steps=2"]
    overrides = [*SETTINGS, *QUIET, *data, *LINES[line]]
    outcome = worlds.train(1, overrides, tmp_path / "run", measure_device)
    hardware = [f"hardware={HARDWARE}", "hardware.refuse=false"]
    said = foretold([*overrides, *hardware], 1)
    assert said["peak"] == pytest.approx(outcome.result["ranks"][0], rel=BOUND), said["causes"]
