"""A whole sweep over items that only pretend to train: each is checked, run, and found again when it is replayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from loomtune.contracts import JobStatus, Launcher
from loomtune.errors import UserError
from loomtune.settings import Settings
from loomtune_plugins.commands.compare import shown
from loomtune_plugins.commands.sweeps import command, crew, engine, processes
from loomtune_plugins.commands.sweeps import sweep as sweeps
from loomtune_plugins.commands.sweeps.items import Item
from loomtune_plugins.commands.sweeps.processes import Job, Process, Running

optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="optuna comes with loomtune[sweeps]")


HANDED_OVER = sweeps.Sweep._handed_over


class Stage:
    """What items do here: their loss is the learning rate's distance from 0.3; `steps` many looks pass till they end.

    faulty: those that do not compose. failing: those that start and fail. at_once: how many ran at a time, at most.
    """

    def __init__(self) -> None:
        self.started: list[str] = []
        self.faulty: set[str] = set()
        self.failing: set[str] = set()
        self.running = self.at_once = 0
        self.looks, self.lasts = 2, {}
        self.leave_at = 0

    def settings(self, item: Item) -> dict[str, str]:
        return dict(text.split("=", 1) for text in item.overrides)

    def start(self, item: Item) -> Running:
        self.started.append(item.label)
        self.running += 1
        self.at_once = max(self.at_once, self.running)
        return Pretended(item, self)

    def compose(self, item: Item, config_dirs: Sequence[str]) -> list[str]:
        if item.label in self.faulty:
            raise UserError.of("no such thing", "write another")
        item.plan = SimpleNamespace(build=lambda *_: SimpleNamespace(detached=False), choices=lambda _: {}, processes=1)
        return []


class Pretended(Running):
    def __init__(self, item: Item, stage: Stage) -> None:
        super().__init__(item)
        self.stage, self.looks = stage, 0
        item.folder.mkdir(exist_ok=True)

    def over(self) -> bool:
        self.looks += 1
        loss = abs(float(self.stage.settings(self.item).get("optimizer.lr", 0.0)) - 0.3)
        with (self.item.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.looks, "loss": loss, "seconds": 0.5}) + "\n")
        if self.stage.leave_at and len(self.stage.started) >= self.stage.leave_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.looks < self.stage.lasts.get(self.item.label, self.stage.looks) and not self.asked:
            return False
        self.stage.running -= 1
        failed = self.item.label in self.stage.failing
        status = "preempted" if self.asked else "failed" if failed else "completed"
        said = {
            "status": status,
            "step": self.looks,
            "metrics": {"loss": loss},
            "error": "it broke" if failed else None,
        }
        (self.item.folder / "result.json").write_text(json.dumps(said))
        self._ended(status, "it broke" if failed else "")
        return True

    def _leave(self) -> None:
        pass

    def kill(self) -> None:
        pass


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage()
    monkeypatch.setattr(sweeps.Sweep, "_start", lambda sweep, item, place: made.start(item))
    monkeypatch.setattr(sweeps.Sweep, "_handed_over", lambda sweep, items: [])
    monkeypatch.setattr(sweeps, "composed", made.compose)
    monkeypatch.setattr(command, "composed", made.compose)
    monkeypatch.setattr(crew, "BETWEEN", 0.0)
    monkeypatch.setattr(shown, "html", lambda *_: "")  # drawing takes longer than all the rest

    def nothing(*_: Any) -> None:
        raise UserError.of("no plan here", "")

    monkeypatch.setattr(command.api, "compose", nothing)
    return made


def compared(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def statuses(folder: Path) -> dict[str, str]:
    found = compared(folder)["runs"]
    return {" ".join(f"{key}={value}" for key, value in one["settings"].items()): one["status"] for one in found}


GRID = ["objective=sft,dpo", "adapter=full,lora,ia3"]


def test_every_combination_is_a_run_and_a_failed_one_does_not_stop_the_others(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.faulty, stage.failing = {"objective=dpo adapter=ia3"}, {"objective=sft adapter=lora"}
    assert command.sweep([*GRID, "optimizer.lr=0.1", f"hydra.sweep.dir={tmp_path}", "hydra.launcher.jobs=2"]) == 1
    assert len(stage.started) == 5 and stage.at_once == 2
    found = statuses(tmp_path)
    assert len(found) == 6 and list(found.values()).count("completed") == 4
    assert found["objective=dpo adapter=ia3"] == found["objective=sft adapter=lora"] == "failed"
    said = capsys.readouterr()
    assert said.err.index("no such thing") < said.err.index("starts"), "said before anything starts"
    assert "no such thing" in said.out and "it broke" in said.out


def test_a_sweep_that_is_started_again_runs_what_is_missing_and_what_failed(stage: Stage, tmp_path: Path) -> None:
    words = [*GRID, f"hydra.sweep.dir={tmp_path}"]
    stage.failing = {"objective=sft adapter=lora"}
    assert command.sweep(words) == 1
    stage.started.clear()
    stage.failing = set()
    assert command.sweep(words) == 0
    assert stage.started == ["objective=sft adapter=lora"]
    assert command.sweep([words[1], words[0], "hydra.launcher.jobs=3", words[2]]) == 0
    assert len(stage.started) == 1, "in another order it is the same sweep"


def test_a_sweep_goes_on_by_its_folder_alone_under_other_settings_of_its_launcher(stage: Stage, tmp_path: Path) -> None:
    stage.leave_at = 2
    assert command.sweep([*GRID, f"hydra.sweep.dir={tmp_path}", "hydra.launcher.jobs=1"]) == 75
    assert len(stage.started) == 2
    assert "preempted" in statuses(tmp_path).values()
    stage.leave_at, stage.started = 0, []
    assert command.again(tmp_path, ["hydra.launcher.jobs=4"]) == 0
    assert len(stage.started) == 5 and stage.at_once == 4


def test_a_sweep_that_was_killed_finds_its_items_by_what_they_left(stage: Stage, tmp_path: Path) -> None:
    words = ["seed=0,1,2", f"hydra.sweep.dir={tmp_path}"]
    assert command.sweep(words) == 0
    first, second, _ = json.loads((tmp_path / "sweep.json").read_text())["items"]
    record = json.loads((tmp_path / f"{first}.json").read_text())
    (tmp_path / f"{first}.json").write_text(json.dumps(record | {"status": "running", "value": None}))
    (tmp_path / f"{second}.json").write_text(json.dumps(record | {"status": "running", "value": None}))
    (tmp_path / second / "result.json").unlink()
    stage.started.clear()
    assert command.sweep(words) == 0
    assert stage.started == ["seed=1"], "the first had ended, though the sweep did not hear of it"


def test_seeds_are_put_together_and_the_best_is_the_best_on_average(stage: Stage, tmp_path: Path) -> None:
    assert command.sweep(["optimizer.lr=0.1,0.25", "seed=0,1,2", f"hydra.sweep.dir={tmp_path}"]) == 0
    found = compared(tmp_path)
    assert [(len(one["values"]), round(one["mean"], 6)) for one in found["over_seeds"]] == [(3, 0.2), (3, 0.05)]
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert "optimizer.lr=0.25" in best["overrides"]
    assert best["command"].startswith("loomtune train ") and "optimizer.lr=0.25" in best["command"]


def test_a_hopeless_item_is_asked_to_leave_and_stays_pruned(stage: Stage, tmp_path: Path) -> None:
    words = ["optimizer.lr=0.3,0.31,0.32,0.9", "hydra.launcher.jobs=4", "hydra.launcher.prune_after=3"]
    words.append(f"hydra.sweep.dir={tmp_path}")
    stage.looks = 8
    assert command.sweep(words) == 0
    found = {one["settings"]["optimizer.lr"]: one for one in compared(tmp_path)["runs"]}
    assert found[0.9]["status"] == "pruned" and found[0.9]["value"] == pytest.approx(0.6)
    assert [found[rate]["status"] for rate in (0.3, 0.31)] == ["completed"] * 2
    stage.started.clear()
    assert command.sweep(words) == 0 and not stage.started


def test_values_arrive_as_they_were_typed(stage: Stage, tmp_path: Path) -> None:
    hostile = "'a \"b\" $(rm) ; `c` \\\\ & {x: [1,\n2]}'"
    words = [f"run.name={hostile},'plain'", 'data.prompt="it\'s, too"', f"hydra.sweep.dir={tmp_path}"]
    assert command.sweep(words) == 0
    typed = [one["overrides"] for one in compared(tmp_path)["runs"]]
    assert sorted(entry for one in typed for entry in one if entry.startswith("run.name")) == [
        f"run.name={hostile}",
        "run.name='plain'",
    ]
    assert all('data.prompt="it\'s, too"' in one for one in typed)
    again = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert again["overrides"] in typed


@optuna
def test_optuna_asks_the_same_again_and_goes_on_where_it_was_stopped(stage: Stage, tmp_path: Path) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=14", "optimizer.lr=tag(log,interval(1e-3,1.0))"]
    assert command.sweep([*search, f"hydra.sweep.dir={tmp_path / 'whole'}"]) == 0
    whole, stage.started, stage.leave_at = stage.started, [], 5
    assert command.sweep([*search, f"hydra.sweep.dir={tmp_path / 'halved'}"]) == 75
    assert 5 <= len(stage.started) < 14
    before, stage.started, stage.leave_at = stage.started, [], 0
    assert command.sweep([*search, f"hydra.sweep.dir={tmp_path / 'halved'}"]) == 0
    assert set(before + stage.started) == set(whole) and len(before + stage.started) <= len(whole) + 1
    values = {one["overrides"][0]: one["value"] for one in compared(tmp_path / "whole")["runs"]}
    assert {one["overrides"][0]: one["value"] for one in compared(tmp_path / "halved")["runs"]} == values
    assert len(values) == 14, "past the ten that the sampler draws without looking"


@optuna
def test_optuna_bears_failures_and_keeps_them_unless_it_is_told_how_many_it_may(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=interval(0.0,1.0)"]
    assert command.sweep([*search, f"hydra.sweep.dir={tmp_path / 'whole'}"]) == 0
    stage.failing, stage.started = set(stage.started[:1]), []
    assert command.sweep([*search, f"hydra.sweep.dir={tmp_path / 'borne'}"]) == 1
    assert len(stage.started) == 4
    stage.started = []
    assert command.sweep([*search, f"hydra.sweep.dir={tmp_path / 'borne'}"]) == 1
    assert not stage.started, "another answer than before would have it ask for others"
    capsys.readouterr()
    strict = [*search, "hydra.sweeper.max_failure_rate=0", f"hydra.sweep.dir={tmp_path / 'strict'}"]
    assert command.sweep(strict) == 1
    assert len(stage.started) == 2 and "enough failures" in capsys.readouterr().err


@optuna
def test_optuna_s_direction_is_that_of_the_goal() -> None:
    request = command.Request.read(["hydra/sweeper=optuna", "seed=0,1"])
    made = engine.config(request)
    engine.fit(made, request, command.Goal("score", "max"), Path("there"))
    assert made.hydra.sweeper.direction == "maximize" and made.hydra.sweeper.sampler.seed == engine.SEED
    assert made.hydra.sweep.dir == "there" and made.hydra.sweeper.max_failure_rate == 1.0


def test_a_dry_run_shows_the_items_and_starts_nothing(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage.faulty = {"objective=dpo adapter=ia3"}
    assert command.shown(GRID) == 1
    said = capsys.readouterr().out
    assert said.count("objective=") == 6 and said.count("no such thing") == 1
    assert not stage.started and not list(tmp_path.iterdir())


@pytest.mark.parametrize("sweeper", ["basic", pytest.param("optuna", marks=optuna)], ids=["basic", "optuna"])
def test_what_can_be_chosen_is_swept_by_a_glob(sweeper: str, capsys: pytest.CaptureFixture[str], stage: Stage) -> None:
    assert command.shown(["adapter=glob(l*a)", f"hydra/sweeper={sweeper}"]) == 0
    assert "adapter=lora" in capsys.readouterr().out


def test_what_a_sweeper_cannot_search_is_refused_in_our_words(stage: Stage, tmp_path: Path) -> None:
    for sweep in (command.shown, command.sweep):
        with pytest.raises(UserError, match="INTERVAL_SWEEP"):
            sweep(["optimizer.lr=interval(0.1,0.2)", f"hydra.sweep.dir={tmp_path}"])


def test_a_sweep_is_made_neither_in_a_run_s_folder_nor_in_a_file(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(UserError, match="folder of a run"):
        command.sweep(["seed=0,1", f"hydra.sweep.dir={tmp_path}"])
    with pytest.raises(UserError, match="cannot be made"):
        command.sweep(["seed=0,1", f"hydra.sweep.dir={tmp_path / 'run.yaml'}"])


@pytest.mark.parametrize("word", ["hydra.launcher.jobs=0", "hydra.launcher.prune_after=-1"])
def test_a_dry_run_refuses_what_the_sweep_would(stage: Stage, word: str) -> None:
    with pytest.raises(UserError, match=word.partition("=")[0]):
        command.shown(["seed=0,1", word])


@optuna
def test_a_metric_that_nobody_has_is_named_with_those_that_there_are(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Optuna ends with an error of its own where no trial has a value."""
    goal = ["hydra.launcher.metric=nobody", "hydra.launcher.mode=max", f"hydra.sweep.dir={tmp_path}"]
    assert command.sweep(["seed=0,1", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", *goal]) == 1
    said = capsys.readouterr()
    assert "No run has nobody. What they have: loss" in said.out and "the sweeper ended" in said.err


def test_two_sweeps_do_not_share_a_folder(stage: Stage, tmp_path: Path) -> None:
    with command._locked(tmp_path), pytest.raises(UserError, match="another sweep"):
        command.sweep(["seed=0,1", f"hydra.sweep.dir={tmp_path}"])


@pytest.mark.parametrize(
    "word",
    ["hydra.launcher.job=2", "hydra.launcher.jobs=many", "hydra/sweeper=annealing", "hydra.sweeper.params={a:1}"],
)
def test_what_hydra_cannot_compose_is_refused_in_our_words(word: str) -> None:
    with pytest.raises(UserError, match="do not compose"):
        command.sweep(["seed=0,1", word])


def test_items_have_gpus_of_their_own_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,8")
    assert crew.places(2, 2) == [{"CUDA_VISIBLE_DEVICES": "3,5"}, {"CUDA_VISIBLE_DEVICES": "7,8"}]
    assert crew.places(3, 0) == [{}, {}, {}]
    with pytest.raises(UserError, match="need 6, and 4 are here"):
        crew.places(3, 2)
    with pytest.raises(UserError, match="runs nothing"):
        crew.places(0, 0)


class Engine(Launcher):
    """An engine that takes arrays, and whose jobs end at the second question."""

    detached = True

    def __init__(self) -> None:
        self.arrays: list[tuple[int, int]] = []
        self.asked: dict[Path, int] = {}

    def submit_all(self, specs: Sequence[Any], at_once: int) -> str | None:
        self.arrays.append((len(specs), at_once))
        return "17"

    def status(self, run: Path) -> JobStatus:
        self.asked[run] = self.asked.get(run, 0) + 1
        if self.asked[run] < 2:
            return JobStatus("pending")
        said = {"status": "completed", "step": 1, "metrics": {"loss": 1.0}, "error": None}
        (run / "result.json").write_text(json.dumps(said))
        return JobStatus("completed")

    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> Any:
        return run

    processes = render = submit = logs = cancel = None  # type: ignore[assignment]


def test_items_of_an_engine_with_arrays_are_one_job(stage: Stage, tmp_path: Path, monkeypatch: Any) -> None:
    engine_ = Engine()
    monkeypatch.setattr(sweeps.Sweep, "_handed_over", HANDED_OVER)

    def plan(words: Sequence[str], *_: Any) -> Any:
        folder = Path(words[-1].partition("=")[2].strip("'"))
        return SimpleNamespace(
            build=lambda *_: engine_, choices=lambda _: {}, chosen=lambda _: {"name": "slurm"}, processes=1,
            overrides=words, folder=folder, root=Settings(),
        )  # fmt: skip

    def compose(item: Item, _: Any) -> list[str]:
        item.plan = plan(item.words())
        return []

    def prepare(made: Any) -> Path:
        made.folder.mkdir()
        return made.folder

    monkeypatch.setattr(sweeps, "composed", compose)
    monkeypatch.setattr(sweeps.api, "compose", plan)
    monkeypatch.setattr(sweeps.api, "prepare", prepare)
    monkeypatch.setattr(processes, "BETWEEN", 0.0)
    assert command.sweep(["seed=0,1,2,3", "hydra.launcher.jobs=2", f"hydra.sweep.dir={tmp_path}"]) == 0
    assert engine_.arrays == [(4, 2)] and not stage.started


def test_an_engine_that_does_not_take_an_item_fails_that_item_alone(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(sweep: Any, item: Item, place: int) -> Running:
        if item.label == "seed=1":
            raise UserError.of("no such partition", "name another")
        return stage.start(item)

    monkeypatch.setattr(sweeps.Sweep, "_start", start)
    assert command.sweep(["seed=0,1,2", f"hydra.sweep.dir={tmp_path}"]) == 1
    assert statuses(tmp_path) == {"seed=0": "completed", "seed=1": "failed", "seed=2": "completed"}


def test_what_an_engine_does_not_know_yet_is_waited_for_and_what_it_cancelled_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BETWEEN", 0.0)
    states = iter(["unknown", UserError.of("no answer", ""), "pending", "preempted", "running", "cancelled"])

    def status(_: Path) -> JobStatus:
        if isinstance(state := next(states), Exception):
            raise state
        return JobStatus(state, "by somebody")

    launcher = SimpleNamespace(status=status)
    job = Job(Item(tmp_path, ("seed=0",), command.Goal()), launcher)
    assert [job.over() for _ in range(6)] == [False] * 5 + [True]
    assert (job.item.status, job.item.error) == ("failed", "cancelled: by somebody")


def test_an_item_that_cannot_start_has_failed_with_what_it_said(tmp_path: Path) -> None:
    item = Item(tmp_path, ("objective=nothing",), command.Goal())
    with (tmp_path / "lock").open("w") as lock:
        running = Process(item, (), {}, lock.fileno())
        while not running.over():
            time.sleep(0.05)
    assert item.status == "failed" and "nothing" in item.error and "cure:" in item.error
    assert Item.found(tmp_path, item.overrides, item.goal).status == "failed"


def test_an_item_is_asked_to_leave_when_its_sweep_is_no_more() -> None:
    program = """
import signal, sys, threading, time
from loomtune_plugins.commands.sweeps import item
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
threading.Thread(target=item.follow, daemon=True).start()
print("follows", flush=True)
time.sleep(600)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin and child.stdout and child.stdout.readline() == "follows\n"
    child.stdin.close()
    assert child.wait(60) == 75


def test_wandb_sees_the_sweep_as_a_group_unless_one_is_set(tmp_path: Path) -> None:
    item = Item(tmp_path / "mine", ("seed=0",), command.Goal())
    for wandb, expected in (({"group": ""}, ["tracker.wandb.group='mine'"]), ({"group": "theirs"}, []), (None, [])):
        item.plan = SimpleNamespace(choices=lambda _, wandb=wandb: {"wandb": wandb} if wandb else {})
        assert item.words() == ["seed=0", f"run.dir='{item.folder}'", *expected]
