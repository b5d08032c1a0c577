"""Completions that ranks of their own draw: the same ones, no rank hangs or stays, and what is begun ahead is kept."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest

from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins.trackers import metrics
from runs.processes import COMMAND, PATIENCE, run, started, tree, wait_for_step
from runs.worlds import Failed, Outcome, World, Worlds
from support import write_rows

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 + 1": (2, ["sharding=single"]),
    "1 + 2": (3, ["sharding=single", "rollout.ranks=2"]),
    "2 with fsdp + 1": (3, ["sharding=fsdp"]),
    "2 with zero 3 + 1": (3, ["sharding=zero", "sharding.stage=3"]),
    "2 that share rows + 1": (3, ["sharding=fsdp", "sharding.tensor=2"]),
}
EVERYDAY = "2 with fsdp + 1"

MEASURED = ("seconds", "per_second", "memory_bytes")
USED = "seconds/"

KINDS: dict[str, list[str]] = {
    "grpo": ["objective=grpo", "objective.epochs=2", "objective.minibatches=2", "objective.beta=0.05"],
    "lora": ["objective=grpo", "adapter=lora", "adapter.rank=4", "objective.beta=0.05"],
    "bf16": ["objective=grpo", "precision=bf16"],
    "ppo": ["objective=ppo", "objective.group=1"],
    "continuous": ["objective=grpo", "rollout=continuous"],
}


@pytest.fixture(scope="module")
def tiny(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A policy that writes a few letters, and is rewarded for vowels and for few of them."""
    made = [{"prompt": f"{number:02} {'ab ' * (number % 4)}"} for number in range(24)]
    rows = write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", made)
    reward = ["reward=[format,length]", "reward.format.pattern='[aeiouAEIOU]'", "reward.format.whole=false"]
    reward += ["reward.length.longest=4", "reward.length.margin=6", "reward.length.weight=0.5"]
    draws = ["objective.group=4", "objective.max_new_tokens=10", "batch.size=4"]
    how = ["optimizer.lr=3e-3", "tracker=[jsonl]", "checkpoint.background=false", "evaluator=[]"]
    return [f"model.path={tied_model}", "data=jsonl", f"data.path={rows}", "max_length=64", *draws, *reward, *how]


def chosen(tiny: list[str], *more: str) -> list[str]:
    """Settings of which later ones replace earlier ones."""
    found = {text.partition("=")[0]: text for text in [*tiny, *more]}
    return list(found.values())


class Parted(World):
    """Processes of which some train. One run each: they stay parted."""

    def run(self, folder: Path, work: Any = None) -> Outcome:
        for _, jobs in self.ranks:
            jobs.send((folder, work))
        answers = [self._answer(jobs) for _, jobs in self.ranks]
        if errors := [(answer["error"], answer["message"]) for answer in answers if "error" in answer]:
            raise Failed(errors)
        return Outcome(folder, answers[0]["result"])


Train = Callable[..., Outcome]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Runs settings, or goes on with a folder's run, on processes of which the last ones generate."""

    def trained(size: int, folder: Path, settings: list[str], *, resumes: bool = False) -> Outcome:
        processes = Parted(size, tmp_path / f"{folder.name}.log")
        worlds = Worlds(tmp_path)
        worlds.worlds[size] = processes
        processes.start()
        try:
            return worlds.resume(size, folder, *settings) if resumes else worlds.train(size, settings, folder)
        finally:
            worlds.stop()

    return trained


def lines(folder: Path) -> list[dict[str, float]]:
    """What was logged, without what a clock says."""
    found = metrics.read(folder)
    return [
        {name: value for name, value in line.items() if not name.endswith(MEASURED) and not name.startswith(USED)}
        for line in found
    ]


def compare(found: Path, expected: Path, within: float = 0.0) -> None:
    ours, theirs = lines(found), lines(expected)
    assert len(ours) == len(theirs) > 0
    for here, there in zip(ours, theirs, strict=True):
        assert here == pytest.approx(there, rel=within, abs=within)


def learns(folder: Path) -> bool:
    """Whether there was something to learn, so that later completions hang on weights that were sent."""
    return any(line["grad_norm"] > 0 for line in lines(folder)[:-1]) and lines(folder)[-1]["loss"] != 0


@pytest.mark.parametrize(
    "layout", [name if name == EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_what_ranks_of_their_own_draw_and_training_learns_of_it_is_what_it_is_without_them(
    layout: str, tiny: list[str], worlds: Worlds, train: Train, tmp_path: Path
) -> None:
    (size, how), base = LAYOUTS[layout], chosen(tiny, *KINDS["grpo"], "steps=6")
    train(size, tmp_path / "aside", chosen(base, "rollout.ranks=1", *how))
    worlds.train(1, chosen(base, "sharding=single"), tmp_path / "alone")
    assert learns(tmp_path / "alone")
    compare(tmp_path / "aside", tmp_path / "alone", within=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "grpo"])
def test_whatever_is_trained_reaches_the_ranks_that_generate(
    kind: str, tiny: list[str], worlds: Worlds, train: Train, tmp_path: Path
) -> None:
    base = chosen(tiny, *KINDS[kind], "steps=6", "sharding=single")
    train(2, tmp_path / "aside", chosen(base, "rollout.ranks=1"))
    worlds.train(1, base, tmp_path / "alone")
    assert learns(tmp_path / "alone")
    compare(tmp_path / "aside", tmp_path / "alone")


AHEAD = ["rollout.ranks=1", "rollout.ahead=1", "sharding=single"]


@pytest.mark.slow
def test_a_batch_that_is_begun_ahead_is_drawn_by_the_policy_before_the_last_update(
    tiny: list[str], worlds: Worlds, train: Train, tmp_path: Path
) -> None:
    base = chosen(tiny, "objective=grpo", "steps=4")
    train(2, tmp_path / "ahead", chosen(base, *AHEAD))
    worlds.train(1, chosen(base, "sharding=single"), tmp_path / "alone")
    worlds.train(1, chosen(base, "sharding=single", "optimizer.lr=0"), tmp_path / "still")
    ahead, alone, still = (lines(tmp_path / name) for name in ("ahead", "alone", "still"))
    drawn = ("rewards/mean", "rewards/std", "completions/mean_length")

    def same(one: dict[str, float], other: dict[str, float]) -> bool:
        return all(one[name] == other[name] for name in drawn)

    assert ahead[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-3)
    assert same(ahead[1], still[1]) and not same(ahead[1], alone[1])
    assert not same(ahead[2], still[2])
    assert ahead[0]["ratio/max"] == pytest.approx(1, abs=1e-3)
    assert ahead[1]["ratio/max"] > 1.001, "the policy has moved since it drew them"
    assert ahead[1]["rollout/apart_max"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stops", [3, 4])
def test_a_checkpoint_keeps_what_was_begun_ahead(stops: int, tiny: list[str], train: Train, tmp_path: Path) -> None:
    base = chosen(tiny, *KINDS["grpo"], "steps=12", *AHEAD)
    train(2, tmp_path / "whole", base)
    train(2, tmp_path / "parts", [*base, f"stop_after={stops}"])
    train(2, tmp_path / "parts", [], resumes=True)
    assert learns(tmp_path / "whole")
    compare(tmp_path / "parts", tmp_path / "whole")


def aside(process: Popen[bytes], rank: int) -> psutil.Process:
    """The worker below a launcher that was started as this rank."""
    for one in tree(process):
        if "loomtune.worker" in one.cmdline() and one.environ().get("RANK") == str(rank):
            return one
    raise AssertionError(f"there is no rank {rank}")


def ends_alone(process: Popen[bytes], members: list[psutil.Process]) -> int:
    """The exit code of a launcher below which nothing is left."""
    code = process.wait(PATIENCE)
    _, alive = psutil.wait_procs(members, timeout=30)
    assert not alive, "a process outlives the run"
    return code


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "lost"), [(1, "the first to fail was rank 1"), (0, "the first to fail was rank 0")])
def test_a_killed_rank_ends_the_run_by_name_and_leaves_no_process(
    rank: int, lost: str, tiny: list[str], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = chosen(tiny, "objective=grpo", "steps=4000", "rollout.ranks=1", "launcher.procs=2", f"run.dir={folder}")
    with started([*COMMAND, "train", *settings], log) as process:
        wait_for_step(folder, 2, process)
        members = tree(process)
        aside(process, rank).kill()
        assert ends_alone(process, members) == 1
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert lost in log.read_text()


@pytest.mark.slow
def test_a_run_that_is_asked_to_leave_takes_its_rollout_ranks_along_and_goes_on_exactly(
    tiny: list[str], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = chosen(tiny, "objective=grpo", "steps=60", *AHEAD, "launcher.procs=2")
    with started([*COMMAND, "train", *settings, f"run.dir={folder}"], log) as process:
        wait_for_step(folder, 2, process)
        members = tree(process)
        os.kill(process.pid, signal.SIGTERM)
        assert ends_alone(process, members) == 75, log.read_text()
    assert json.loads((folder / "result.json").read_text())["status"] == "preempted"
    assert run([*COMMAND, "resume", str(folder)], log) == 0, log.read_text()
    assert run([*COMMAND, "train", *settings, f"run.dir={tmp_path / 'whole'}"], log) == 0, log.read_text()
    compare(folder, tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["rollout.ranks=2", "launcher.procs=2"], "rollout.ranks=2 leaves none of 2 processes to train"),
        (["rollout.ranks=1", "launcher.procs=3", "sharding=single"], "sharding=single runs on one process, not on 2"),
    ],
)
def test_ranks_that_cannot_be_are_refused_before_any_process_exists(
    settings: list[str], said: str, tiny: list[str]
) -> None:
    with pytest.raises(UserError, match=said):
        api.check(api.compose(chosen(tiny, "objective=grpo", "steps=1", *settings)))
