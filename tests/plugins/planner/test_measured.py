"""What a rehearsal says of memory, against what the allocator gave out in real runs. All lines: `make memory-table`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from runs.allocating import measure
from runs.foretelling import foretold
from runs.worlds import Worlds
from support import ROOT

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="runs/allocations.cpp needs a compiler, named c++")

BOUND = 0.01
"""Of these lines, which are well understood; that of the whole table is wider."""


@pytest.fixture(scope="module")
def cases() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import memory_cases as module

        yield module


@pytest.fixture(scope="module")
def rows(cases: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("rows")
    cases.write(folder)
    return folder


LINES = {
    "full, AdamW": {},
    "LoRA in bf16, packed": {"settings": "adapter=lora precision=bf16 packing=true", "mixed": True},
    "FSDP on two ranks": {"settings": "sharding=fsdp", "processes": 2},
}


SLOW = {
    "recomputed, in small batches": {"settings": "sharding.activation_checkpointing=true batch.micro=1"},
    "pairs by LoRA, in pieces": {"settings": "adapter=lora", "objective": "dpo"},
    "HSDP in bf16": {"settings": "sharding=fsdp sharding.replicate=2 precision=bf16", "processes": 4},
    "ZeRO 3": {"settings": "sharding=zero sharding.stage=3", "processes": 2},
}


@pytest.mark.parametrize("line", [*LINES, *(pytest.param(line, marks=pytest.mark.slow) for line in SLOW)])
def test_the_peak_is_foretold(line: str, cases: ModuleType, rows: Path, worlds: Worlds, tmp_path: Path) -> None:
    case = cases.Case("Llama 11 M", length=128, **(LINES | SLOW)[line])
    outcome = worlds.train(case.processes, case.overrides(rows), tmp_path / "run", measure)
    measured = outcome.result["ranks"][0]["peak"]
    assert measured > 40e6, "so small, nothing would be seen"
    assert foretold(case.overrides(rows), case.processes)["peak"] == pytest.approx(measured, rel=BOUND)
