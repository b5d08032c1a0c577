"""draft"""
from __future__ import annotations
import random
from pathlib import Path
import pytest
from runs.curves import agree
from support import write_rows

ONE = ["sharding.sequence=2"]
HOW = {
    "fsdp": ["sharding=fsdp"], "fsdp seq": ["sharding=fsdp", "sharding.sequence=2"],
    "zero": ["sharding=zero", "sharding.persist=0"], "zero seq": ["sharding=zero", "sharding.persist=0", "sharding.sequence=2"],
}

@pytest.mark.parametrize("how", HOW)
def test_long(how, train, tiny, tmp_path):
    draw = random.Random(3)
    rows = [{"prompt": "p" * draw.randint(30, 60), "completion": "".join(draw.choices("abcdef", k=draw.randint(2, 62)))} for _ in range(200)]
    path = write_rows(tmp_path / "long.jsonl", rows)
    settings = [*(s for s in tiny if not s.startswith("data.path")), f"data.path={path}", "batch.size=64", "batch.micro=32", "steps=10"]
    agree(train(2, settings, *HOW[how]), train(1, settings, "sharding=single", folder="alone"))
