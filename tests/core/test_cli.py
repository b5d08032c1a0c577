"""The command itself: a mistake ends it at once with a cure; questions are answered without heavy libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune import __version__, api, cli, hookimpl
from loomtune.catalogue import Catalogue, Source
from loomtune.cli import main
from loomtune.errors import LeaseLost, Preempted, RunFailed, UserError
from loomtune.offers import Command

COMMAND = Path(sys.executable).with_name("loomtune")
HEAVY = ("torch", "deepspeed", "peft")


class Outcome:
    """A command that has ended. imported: top-level packages that it imported."""

    def __init__(self, ran: subprocess.CompletedProcess[str]) -> None:
        lines = ran.stderr.splitlines()
        times = [line for line in lines if line.startswith("import time:")]
        self.imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in times}
        self.said = "\n".join(line for line in lines if line not in times)
        self.code, self.output = ran.returncode, ran.stdout


def command(*arguments: object, cwd: Path) -> Outcome:
    env = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    ran = subprocess.run([COMMAND, *map(str, arguments)], env=env, cwd=cwd, capture_output=True, text=True, check=False)
    return Outcome(ran)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., str]:
    """Makes a file of rows and gives the settings that name it."""

    def make(*rows: dict[str, str]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"data.path={path}"

    return make


def own(model: Path, *more: str) -> list[str]:
    return [f"model.path={model}", "data=jsonl", "tracker=[jsonl]", *more]


ROW = {"prompt": "a", "completion": "b"}


def assert_refused(outcome: Outcome, folder: Path, *what: str) -> None:
    assert outcome.code == 2, outcome.said
    assert outcome.said.startswith("loomtune: ")
    assert "Traceback" not in outcome.said
    assert outcome.said.count("cure: ") == len(what), outcome.said
    for part in what:
        assert part in outcome.said
    assert not outcome.imported & set(HEAVY), "a mistake is found before anything heavy is imported"
    assert not outcome.output
    assert not list(folder.glob("run*/")), "nothing is left behind"


@pytest.mark.parametrize(
    ("mistake", "what"),
    [
        ("optimiser.lr=1", "there is no setting 'optimiser.lr'. Did you mean 'optimizer.lr'?"),
        ("adapter.rnak=8", "there is no setting 'adapter.rnak'. Did you mean 'adapter.rank'?"),
        ("objective=dop", "no objective is called 'dop'"),
        ("steps=many", "steps=many: Value 'many' of type 'str' could not be converted to Integer"),
    ],
)
def test_a_mistake_in_a_setting_ends_the_command(tmp_path: Path, mistake: str, what: str) -> None:
    outcome = command("train", mistake, cwd=tmp_path)
    assert_refused(outcome, tmp_path, what)
    assert "transformers" not in outcome.imported


def test_a_missing_file_ends_the_command(tmp_path: Path, tiny_model: Path) -> None:
    outcome = command("train", *own(tiny_model), "data.path=absent.jsonl", cwd=tmp_path)
    assert_refused(outcome, tmp_path, "absent.jsonl")


def test_a_missing_model_ends_the_command(tmp_path: Path, rows: Callable[..., str]) -> None:
    outcome = command("train", "data=jsonl", rows(ROW), "model.path=./absent", cwd=tmp_path)
    assert_refused(outcome, tmp_path, "absent")


def test_an_empty_data_file_ends_the_command(tmp_path: Path, tiny_model: Path, rows: Callable[..., str]) -> None:
    outcome = command("train", *own(tiny_model), rows(), cwd=tmp_path)
    assert_refused(outcome, tmp_path, "rows.jsonl has no rows")


def test_a_row_without_targets_ends_the_command(tmp_path: Path, tiny_model: Path, rows: Callable[..., str]) -> None:
    outcome = command("train", *own(tiny_model), rows(ROW, {"messages": []}), cwd=tmp_path)  # type: ignore[dict-item]
    assert_refused(outcome, tmp_path, "rows.jsonl:2")


def test_a_micro_batch_larger_than_the_batch_ends_the_command(
    tmp_path: Path, tiny_model: Path, rows: Callable[..., str]
) -> None:
    outcome = command("train", *own(tiny_model), rows(ROW), "batch.size=2", "batch.micro=3", cwd=tmp_path)
    assert_refused(outcome, tmp_path, "batch.micro=3 does not lie between 1 and batch.size=2")


def test_several_processes_of_a_single_one_end_the_command(
    tmp_path: Path, tiny_model: Path, rows: Callable[..., str]
) -> None:
    outcome = command("train", *own(tiny_model), rows(ROW), "sharding=single", "launcher.procs=2", cwd=tmp_path)
    assert_refused(outcome, tmp_path, "sharding=single runs on one process, not on 2")


def test_mistakes_of_different_kinds_are_told_together(tmp_path: Path) -> None:
    outcome = command("train", "optimiser.lr=1", "objective=dop", "steps=many", "~tracker", cwd=tmp_path)
    assert_refused(outcome, tmp_path, "'optimiser.lr'", "'dop'", "steps=many", "'~tracker'")
    model = command(
        "train", "data=jsonl", "data.path=absent.jsonl", "model.path=./gone", "batch.micro=99", "sharding=single",
        "launcher.procs=3", cwd=tmp_path,
    )  # fmt: skip
    assert_refused(model, tmp_path, "absent.jsonl", "gone", "batch.micro=99", "not on 3")


def test_a_misspelt_setting_and_missing_files_are_told_together(tmp_path: Path) -> None:
    outcome = command(
        "train", "optimiser.lr=1", "data=jsonl", "data.path=absent.jsonl", "model.path=./gone", cwd=tmp_path
    )
    assert_refused(outcome, tmp_path, "Did you mean 'optimizer.lr'?", "absent.jsonl does not exist", "folder 'gone'")
    assert "set data.path to a file that exists" in outcome.said and "set model.path to a folder" in outcome.said
    assert "transformers" not in outcome.imported


def test_a_dangling_reference_and_a_missing_file_are_told_together(tmp_path: Path) -> None:
    outcome = command("train", "steps=${nowhere}", "data=jsonl", "data.path=absent.jsonl", cwd=tmp_path)
    assert_refused(outcome, tmp_path, "steps=${nowhere} cannot be resolved", "absent.jsonl does not exist")


@pytest.mark.parametrize(
    ("typed", "what"),
    [
        (["data=jsonl", "dta.path=absent.jsonl"], "there is no setting 'dta.path'"),
        (["data=jsonl", "data.pth=absent.jsonl"], "there is no setting 'data.pth'"),
        (["data=jsonl", "data.path=a.jsonl,b.jsonl"], "asks for several runs"),
        (["data=jsonl", "data.path=${absent}"], "data.path=${absent} cannot be resolved"),
        (["recipe=nope", "data=jsonl", "data.path=absent.jsonl"], "no recipe is called 'nope'"),
        (["stepz=1", "model.path=acme/on-a-hub-that-nobody-asks"], "there is no setting 'stepz'"),
    ],
)
def test_no_file_is_missed_on_account_of_another_mistake(tmp_path: Path, typed: list[str], what: str) -> None:
    outcome = command("train", *typed, cwd=tmp_path)
    assert_refused(outcome, tmp_path, what)
    assert not outcome.imported & {"transformers", "huggingface_hub"}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plugins"], ["plugins", "sharding", "--json"]])
def test_questions_are_answered_without_heavy_libraries(tmp_path: Path, arguments: list[str]) -> None:
    outcome = command(*arguments, cwd=tmp_path)
    assert outcome.code == 0, outcome.said
    assert not outcome.imported & {*HEAVY, "transformers", "hydra", "omegaconf", "datasets", "wandb"}
    assert outcome.output


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--help") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("train", "resume", "evaluate", "chat", "report", "plugins"))
    assert called("--version") == 0
    assert capsys.readouterr().out == f"loomtune {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--dryrun"], ["plugins", "a", "b"], ["resume"]])
def test_a_mistyped_command_line_ends_with_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*arguments) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "run", "code", "told"),
    [
        ("spin", "builtins:len", 3, ""),  # answers with the number of the words that it gets
        ("spin", "acme_absent:spin", 2, "the command spin of acme (loomtune-acme 4.5) cannot be imported"),
        ("train", "builtins:len", 2, "the command train of acme (loomtune-acme 4.5) is there already"),
    ],
)
def test_a_plugin_brings_a_command(
    name: str, run: str, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = SimpleNamespace(commands=hookimpl(lambda: [Command("train", "builtins:len", "trains")]))
    theirs = SimpleNamespace(commands=hookimpl(lambda: [Command(name, run, "spins")]))
    catalogue = Catalogue([(Source("ours", "loomtune", "1"), ours), (Source("acme", "loomtune-acme", "4.5"), theirs)])
    monkeypatch.setattr(cli, "installed", lambda: catalogue)
    assert called(name, "--fast", "wool", "a=b") == code
    assert told in capsys.readouterr().err


def test_settings_may_stand_after_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    result = api.Result(Path(), "completed", 1, {}, None)
    monkeypatch.setattr(api, "train", lambda *arguments: seen.append(arguments) or result)
    assert called("train", "steps=1", "--config-dir", "a", "seed=2", "--config-dir", "b", "run.name=x y") == 0
    assert seen == [(["steps=1", "seed=2", "run.name=x y"], ["a", "b"])]


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (UserError.of("what", "cure"), 2),
        (RunFailed("lost a rank"), 1),
        (LeaseLost("superseded"), 1),
        (Preempted("leaving"), 75),
        ("completed", 0),
        ("completed, but an export failed", 1),
        ("stopped", 0),
        ("failed, RuntimeError: of a UserError: x", 1),
        ("failed, UserError: x", 2),
        ("failed, rank 3 on node-1.a: UserError: x", 2),
        ("preempted", 75),
        (KeyboardInterrupt(), 130),
    ],
    ids=str,
)
def test_the_exit_code_says_what_to_do(ends: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> api.Result:
        if isinstance(ends, BaseException):
            raise ends
        status, _, after = ends.partition(", ")
        return api.Result(Path(), status, 3, {}, after or None)

    monkeypatch.setattr(api, "train", train)
    assert called("train") == code


def test_plugins_tells_settings_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("plugins", "optimizer=adamw", "--json") == 0
    (adamw,) = json.loads(capsys.readouterr().out)["offers"]
    assert (adamw["axis"], adamw["name"], adamw["distribution"]) == ("optimizer", "adamw", "loomtune")
    rate = next(setting for setting in adamw["settings"] if setting["key"] == "lr")
    assert rate["type"] == "float" and rate["default"] > 0 and "rate" in rate["help"]


def test_plugins_lists_by_axis_hook_offer_plugin_and_trait(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*arguments: str) -> set[str]:
        assert called("plugins", *arguments, "--json") == 0
        return {f"{offer['axis']}={offer['name']}" for offer in json.loads(capsys.readouterr().out)["offers"]}

    assert listed("schedule") == listed("schedules") == listed("loomtune_plugins.schedules")
    assert "schedule=cosine" in listed("schedule")
    assert listed("cosine") == {"schedule=cosine"}
    assert "rollout=huggingface" in listed("--trait", "generation")
    assert listed("data", "--trait", "databases") == {"data=sql_quiz", "data=sql_labels"}
    assert listed() > listed("schedule")


def test_plugins_of_an_unknown_name_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("plugins", "nothing") == 2
    said = capsys.readouterr().err
    assert "nothing is called 'nothing'" in said and "adamw" in said


def test_a_dry_run_shows_every_setting_with_its_origin_and_starts_nothing(
    tmp_path: Path, tiny_model: Path, rows: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    typed = own(tiny_model, rows(ROW), "run.name='two\nlines'", f"run.dir={tmp_path / 'run'}", "launcher.procs=2")
    assert called("train", "--dry-run", *typed, "optimizer.lr=1e-3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "optimizer.lr=0.001  # command line" in lines
    assert "optimizer.clip=1.0  # default" in lines
    assert "sharding.name=fsdp  # config.yaml" in lines
    assert "run.name='two\\nlines'  # command line" in lines
    assert lines[-1].startswith("would run: ") and "--nproc-per-node=2" in lines[-1]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_finds_what_a_run_would_find(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("train", "--dry-run", *own(tiny_model, "data.path=absent.jsonl")) == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_values_arrive_literally_in_run_yaml(tmp_path: Path, tiny_model: Path, rows: Callable[..., str]) -> None:
    from loomtune.plan import Plan

    name = 'it\'s; $(touch pwned) `x` "q" é\nsecond'
    quoted = '"' + name.replace('"', '\\"') + '"'
    folder = tmp_path / "a folder, (odd) & 'quoted'"
    escaped = str(folder).replace("'", "\\'")
    typed = own(tiny_model, rows(ROW), f"run.name={quoted}", f"run.dir='{escaped}'")
    assert api.prepare(api.compose(typed)) == folder
    plan = Plan.load(folder)
    assert plan.root.run.name == name
    assert not (tmp_path / "pwned").exists()


def test_a_reader_that_has_left_ends_a_command_quietly(tmp_path: Path) -> None:
    ends, begins = os.pipe()
    os.close(ends)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for axis in ("launcher", "data"):  # which is written at the end, and which before
        words = [COMMAND, "plugins", axis]
        ran = subprocess.run(words, stdout=begins, stderr=subprocess.PIPE, env=env, cwd=tmp_path, check=False)
        assert (ran.returncode, ran.stderr) == (0, b"")
    os.close(begins)
