"""What the tests of whole runs train: a tiny model on mixed rows, and a real small one on real rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runs.scoring import LORA
from runs.worlds import Outcome, Worlds
from support import shared, write_rows


@pytest.fixture(scope="session")
def tiny(tied_model: Path, mixed_data: Path) -> list[str]:
    """Settings of a run of the tiny model."""
    return [
        f"model.path={tied_model}",
        "data=jsonl",
        f"data.path={mixed_data}",
        "optimizer.lr=1e-3",
        "optimizer.clip=1.0",
        "tracker=[jsonl]",
        "checkpoint.background=false",
    ]


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run of a pretrained model on the shorter rows of GSM8K."""
    model, data = shared("models", "stories260k"), shared("data", "gsm8k", "train.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    short = [row for row in rows if len(row["question"]) + len(row["answer"]) < 260][:320]  # each seen once in 40 steps
    path = write_rows(tmp_path_factory.mktemp("gsm8k") / "short.jsonl", short)
    return [
        f"model.path={model}",
        "data=jsonl",
        f"data.path={path}",
        "data.prompt=question",
        "data.completion=answer",
        "optimizer.lr=1e-3",
        "tracker=[jsonl]",
        "checkpoint.background=false",
    ]


@pytest.fixture(scope="session")
def liking(worlds: Worlds, tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a reward model that learned by LoRA to like an answer of three words."""
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"loom {n}", "chosen": "over and under", "rejected": "no" * (n % 5 + 1)} for n in range(16)]
    data = ["data=jsonl", f"data.path={write_rows(folder / 'pairs.jsonl', rows)}", f"model.path={tied_model}"]
    settings = [*data, *LORA, "adapter.dropout=0.1", "objective=reward", "batch.size=4", "steps=6", "optimizer.lr=1e-2"]
    return worlds.train(1, [*settings, "sharding=single", "tracker=[jsonl]"], folder / "run").folder


@pytest.fixture
def train(worlds: Worlds, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs settings on a world of some size, in a folder of its own."""

    def run(size: int, overrides: list[str], *more: str, folder: str = "run") -> Outcome:
        return worlds.train(size, [*overrides, *more], tmp_path / folder)

    return run


@pytest.fixture(scope="session")
def alone(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """The run on one process that others are compared with, made once for each set of settings."""
    made: dict[tuple[str, ...], Outcome] = {}

    def of(*settings: str) -> Outcome:
        if settings not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[settings] = worlds.train(1, [*settings, "sharding=single"], folder)
        return made[settings]

    return of
