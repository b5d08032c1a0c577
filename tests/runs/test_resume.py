"""Checkpoints: a run that is killed, stopped or moved to other processes goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import parity
from runs.curves import agree
from runs.processes import COMMAND, PATIENCE, kill_all, run, started, tree, wait_for_step
from runs.worlds import Outcome, Worlds, maths

Train = Callable[..., Outcome]

STEPS = 60
"""So many that none is over before a signal can reach it."""

ALONE = (1, ["sharding=single"])
SHARDED = (2, ["sharding=fsdp"])
REPLICATED = (2, ["sharding=ddp"])


@pytest.fixture(scope="module")
def endless(tiny: list[str]) -> list[str]:
    """A run long enough to be interrupted, which writes its checkpoints while it trains."""
    kept = [text for text in tiny if not text.startswith("checkpoint.background")]
    return [*kept, f"steps={STEPS}", "checkpoint.every=5"]


@pytest.fixture(scope="module")
def uninterrupted(
    worlds: Worlds, endless: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Outcome]:
    """The same run on the same processes, left alone; made once for each way."""
    made: dict[str, Outcome] = {}

    def of(size: int, how: list[str]) -> Outcome:
        if (name := f"{how} on {size}") not in made:
            made[name] = worlds.train(size, [*endless, *how], tmp_path_factory.mktemp("uninterrupted") / "run")
        return made[name]

    return of


def command(size: int, how: list[str], settings: list[str], folder: Path) -> list[str]:
    return [*COMMAND, "train", *settings, *how, f"launcher.procs={size}", f"run.dir={folder}"]


def status(folder: Path) -> str:
    return str(json.loads((folder / "result.json").read_text())["status"])


@pytest.mark.parametrize("how", [SHARDED, *(pytest.param(how, marks=pytest.mark.slow) for how in (ALONE, REPLICATED))])
def test_a_killed_run_goes_on_to_the_bit(
    how: tuple[int, list[str]], endless: list[str], uninterrupted: Train, worlds: Worlds, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    with started(command(*how, endless, folder), tmp_path / "log") as process:
        wait_for_step(folder, 7, process)
        kill_all(process)
    assert not (folder / "result.json").exists(), "killed in the midst of it"
    committed = sorted((folder / "checkpoints").glob("step-*[0-9]"))
    resumed = worlds.resume(how[0], folder)
    assert committed, "checkpoints were committed while the run went on"
    assert resumed.result["status"] == "completed"
    assert resumed.lines == uninterrupted(*how).lines


@pytest.mark.parametrize("how", [SHARDED, pytest.param(ALONE, marks=pytest.mark.slow)])
def test_a_polite_signal_to_the_launcher_leaves_a_checkpoint_and_says_start_me_again(
    how: tuple[int, list[str]], endless: list[str], uninterrupted: Train, tmp_path: Path
) -> None:
    folder, log = tmp_path / "stopped", tmp_path / "log"
    with started(command(*how, endless, folder), log) as process:
        wait_for_step(folder, 7, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 75, log.read_text()
    assert status(folder) == "preempted"
    stopped = [line["step"] for line in maths(folder)]
    assert len(stopped) < STEPS
    assert (folder / "checkpoints" / f"step-{stopped[-1]:08}" / "manifest.json").is_file(), "nothing done is lost"
    assert run([*COMMAND, "resume", str(folder)], log) == 0, log.read_text()
    assert status(folder) == "completed"
    assert maths(folder) == uninterrupted(*how).lines


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_launcher(tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "orphaned"
    with started(command(*SHARDED, [*tiny, "steps=100000"], folder), tmp_path / "log") as process:
        wait_for_step(folder, 7, process)
        ranks = [member for member in tree(process) if member.pid != process.pid]
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, timeout=PATIENCE / 2)
    assert not alive


LORA = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.1"]
MOVES = [ALONE, (3, ["sharding=fsdp"]), REPLICATED, (2, ["sharding=fsdp", "sharding.offload=true", "batch.micro=1"])]


@pytest.mark.parametrize(
    "adapter", [pytest.param([], id="full", marks=pytest.mark.slow), pytest.param(LORA, id="lora")]
)
def test_a_run_moves_between_layouts_and_keeps_its_curve(
    adapter: list[str], tiny: list[str], train: Train, worlds: Worlds
) -> None:
    settings = [*tiny, *adapter, "steps=40"]
    moved = train(1, settings, "sharding=single", "stop_after=10", folder="moved")
    assert moved.result["status"] == "stopped"
    for end, (size, how) in zip((20, 30, 0), MOVES[1:], strict=True):
        moved = worlds.resume(size, moved.folder, *how, *([f"stop_after={end}"] if end else []))
    assert moved.result["status"] == "completed"
    agree(moved, train(1, settings, "sharding=single", folder="still"))


def test_the_optimizer_s_state_is_what_goes_on(tiny: list[str], train: Train, worlds: Worlds) -> None:
    """Guards the test above: without the moments of Adam the curve after a move would be another."""
    settings = [*tiny, "steps=12", "sharding=single"]
    moved = train(1, settings, "stop_after=6", folder="moved")
    for path in (moved.folder / "checkpoints").rglob("optimizer/*.safetensors"):
        assert path.stat().st_size > 2 * next(path.parents[1].rglob("model/model.safetensors")).stat().st_size - 8192
    resumed = worlds.resume(1, moved.folder)
    assert resumed.lines == train(1, settings, folder="still").lines


PLACES = {
    "single": (1, "sharding=single"),
    "ddp on 2": (2, "sharding=ddp"),
    "fsdp on 2": (2, "sharding=fsdp"),
    "fsdp on 4": (4, "sharding=fsdp"),
    "zero 1 on 2": (2, "sharding=zero sharding.stage=1"),
    "zero 2 on 2": (2, "sharding=zero sharding.stage=2"),
    "zero 3 on 2": (2, "sharding=zero sharding.stage=3"),
    "zero 3 on 4": (4, "sharding=zero sharding.stage=3"),
}
QUICK = [("tied", "ddp on 2", "fsdp on 4"), ("odd", "fsdp on 4", "ddp on 2"), ("odd", "fsdp on 2", "zero 3 on 4")]
ODD = {
    "model_type": "llama",
    "hidden_size": 35,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 1467,
    "max_position_embeddings": 256,
    "tie_word_embeddings": "false",
}
Halves = Callable[[str, str], Outcome]


def pairs() -> list[Any]:
    """Every ordered pair of places for both models; all but a few behind `-m slow`."""
    every = [(model, a, b) for model in ("tied", "odd") for a in PLACES for b in PLACES]
    return [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow) for one in every]


@pytest.fixture(scope="module")
def learner(request: pytest.FixtureRequest, mixed_data: Path) -> Callable[[str], list[str]]:
    """Settings of a pretrained model with tied embeddings on real rows, or of one that nothing divides evenly."""

    def of(model: str) -> list[str]:
        if model == "tied":
            real: list[str] = request.getfixturevalue("real")
            return real
        shape = [f"model.shape.{key}={value}" for key, value in ODD.items()]
        source = ["data=jsonl", f"data.path={mixed_data}", "optimizer.lr=1e-3"]
        return ["model=random", *shape, *source, "tracker=[jsonl]", "checkpoint.background=false"]

    return of


@pytest.fixture(scope="module")
def halves(worlds: Worlds, learner: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Halves:
    """The first ten of twenty steps at a place, or all of them where none is named; each made once."""
    made: dict[tuple[str, str], Outcome] = {}

    def of(model: str, place: str) -> Outcome:
        if (model, place) not in made:
            size, how = placed(place or "single")
            settings = [*learner(model), *how, "steps=20", *(["stop_after=10"] if place else [])]
            made[model, place] = worlds.train(size, settings, tmp_path_factory.mktemp("half") / "run")
        return made[model, place]

    return of


def placed(place: str) -> tuple[int, list[str]]:
    size, how = PLACES[place]
    if reason := parity.lacking(how):
        pytest.skip(reason)
    return size, how.split()


@pytest.mark.parametrize(("model", "begun", "ended"), pairs())
def test_any_checkpoint_resumes_anywhere(
    model: str, begun: str, ended: str, halves: Halves, worlds: Worlds, tmp_path: Path
) -> None:
    size, how = placed(ended)
    half = halves(model, begun)
    assert half.result["status"] == "stopped" and half.result["step"] == 10
    folder = shutil.copytree(half.folder, tmp_path / "run")
    resumed = worlds.resume(size, folder, *how)
    assert [line["step"] for line in resumed.lines] == [*range(1, 21)]
    assert resumed.lines[:10] == half.lines, "what was done is not done again"
    agree(resumed, halves(model, ""))
