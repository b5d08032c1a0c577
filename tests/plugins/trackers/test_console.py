"""What a user sees in the terminal."""

from types import SimpleNamespace

import pytest

from loomtune.errors import UserError
from loomtune_plugins.trackers.console import Console
from loomtune_plugins.trackers.jsonl import Jsonl
from loomtune_plugins.trackers.settings import ConsoleSettings, JsonlSettings


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_terminal_the_first_the_last_and_every_few_steps_have_a_line(story, capsys, monkeypatch) -> None:
    plain(monkeypatch)
    told = story(console=Console(ConsoleSettings(every=5)))
    told.run.steps = 12
    for step in range(1, 13):
        told.step(step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/12", "5/12", "10/12", "12/12"]
    assert lines[1] == "step 5/12  loss 0.8000  grad_norm 1  lr 1.00e-03  tokens/s 1,234  0:00:04 to go"


def test_a_run_that_stops_early_counts_to_its_stop(story, capsys, monkeypatch) -> None:
    plain(monkeypatch)
    told = story(console=Console(ConsoleSettings()))
    told.run.settings.stop_after = 2
    told.step(1)
    told.step(2)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/2", "2/2"]


def test_the_end_shows_before_and_after_and_where_everything_is(story, capsys, monkeypatch) -> None:
    plain(monkeypatch)
    told = story(console=Console(ConsoleSettings()), jsonl=Jsonl(JsonlSettings()))
    told.evaluated(0, sql_accuracy_before=0.125)
    told.step(1)
    told.evaluated(1, sql_accuracy=0.625)
    told.end()
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "sql_accuracy" in line and "+0.5" in line)
    assert "0.125" in row and "0.625" in row
    assert f"completed after step 1 of 4; everything is in {told.run.folder}" in out
    assert f"metrics: {told.run.folder / 'metrics.jsonl'}" in out


def test_the_start_says_what_is_trained_of_every_network(story, capsys, monkeypatch) -> None:
    plain(monkeypatch)
    told = story(console=Console(ConsoleSettings()))
    shapes = {"model.layers.0.up.weight": (4, 2), "model.layers.1.up.weight": (4, 2), "model.norm.weight": (2,)}
    policy = SimpleNamespace(trained=lambda: {"model.norm.weight": (2,)})
    value = SimpleNamespace(trained=lambda: shapes)
    told.run.model = SimpleNamespace(weights=lambda seed: SimpleNamespace(shapes=lambda: shapes))
    told.run.roles = {"policy": SimpleNamespace(engine=policy), "value": SimpleNamespace(engine=value)}
    told.run.trained_engines = lambda: [policy, value]
    told.tell("model_ready")
    assert capsys.readouterr().out.splitlines() == [
        "trains 2 parameters, 11.111% of the 18 that the model has by itself",
        "  model.norm.weight  1 x (2,)  2",
        "value: trains all 18 parameters of the model",
    ]


def test_on_a_terminal_a_bar_moves(story, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "140")
    told = story(console=Console(ConsoleSettings()))
    for step in (1, 2, 3, 4):
        told.step(step)
    told.end()
    out = capsys.readouterr().out
    assert "4/4" in out and "loss 1.0000" in out and "\x1b[" in out
    assert "step 4/4" not in out


def test_a_resume_says_from_where(story, capsys, monkeypatch) -> None:
    plain(monkeypatch)
    told = story(console=Console(ConsoleSettings()))
    told.loaded(7)
    assert capsys.readouterr().out.startswith("goes on after step 7 from ")


def test_a_resumed_run_still_shows_what_was_measured_before_training(story, capsys, monkeypatch) -> None:
    plain(monkeypatch)
    told = story(jsonl=Jsonl(JsonlSettings()))
    told.evaluated(0, sql_accuracy_before=0.125)
    told.step(1)
    told.step(2)
    again = story(console=Console(ConsoleSettings()))
    again.loaded(1)
    again.step(2)
    again.evaluated(2, sql_accuracy=0.625)
    again.end()
    row = next(line for line in capsys.readouterr().out.splitlines() if "sql_accuracy" in line and "+0.5" in line)
    assert "0.125" in row and "0.625" in row


def test_lines_every_no_step_are_refused() -> None:
    with pytest.raises(UserError, match=r"tracker\.console\.every"):
        Console(ConsoleSettings(every=0))
