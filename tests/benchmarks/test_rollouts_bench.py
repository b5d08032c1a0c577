"""Completions are at least five times as many a second as with transformers' `generate`, a prompt at a time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from support import ROOT, shared


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("rollouts_bench", ROOT / "benchmarks" / "rollouts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_engine_is_measured(bench: ModuleType, tied_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--prompts", "4", "--tokens", "3", "--group", "2", "--grouped", "5", "9", "--rounds", "1"]
    bench.main(["--model", str(tied_model), *few])
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [name for name in names if name] == [
        *("generate, one by one", "huggingface", "huggingface, rollout.batch=1", "continuous"),
        *("huggingface, 4 long prompts", "huggingface, 2 completions of each"),
    ]


@pytest.mark.slow
def test_64_prompts_are_completed_five_times_as_quickly_as_one_by_one(bench: ModuleType) -> None:
    """Eleven times was measured; both take turns in one process."""
    assert bench.main(["--model", str(shared("models", "stories260k")), "--rounds", "1"]) == 0
