"""What `loomtune inspect` reads, and what it says beside the figures."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import datasets
import pytest

from loomtune import cli
from loomtune_plugins.commands.inspect import command
from loomtune_plugins.commands.inspect.summary import Summary
from loomtune_plugins.commands.inspect.terminal import Terminal
from support import write_rows

Looked = Callable[..., Any]


@pytest.fixture
def looked(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Looked:
    """The command over the tiny model; gives what it wrote. ends: with which exit code."""

    def called(*words: object, ends: int = 0) -> Any:
        with pytest.raises(SystemExit) as ended:
            cli.main(["inspect", *map(str, words), f"model.path={tiny_model}"])
        assert ended.value.code == ends
        return capsys.readouterr()

    return called


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_that_datasets_saved_is_read_as_such(looked: Looked, tmp_path: Path, splits: bool) -> None:
    saved = datasets.Dataset.from_list([{"prompt": f"{n}? ", "completion": f"answer {n}"} for n in range(4)])
    (datasets.DatasetDict({"train": saved}) if splits else saved).save_to_disk(tmp_path / "saved")
    told = looked(tmp_path / "saved", "--row", 2).out
    assert "── train:2 ─" in told and "data=datasets saved" in told
    (tmp_path / "other").mkdir()
    assert "nor one that datasets saved" in looked(tmp_path / "other", ends=2).err


def test_what_the_figures_say_of_max_length_is_no_warning_besides(looked: Looked, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "long.jsonl", [{"prompt": "ab ", "completion": "cd " * 40}])
    told = looked(path, "max_length=20")
    assert "1 lose " in told.out and "lose" not in told.err


def test_a_first_look_that_takes_long_says_why(looked: Looked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[float]()

    class Late(Timer):
        """Its time is over at once."""

        def start(self) -> None:
            asked.append(self.interval)
            self.function(*self.args, **self.kwargs)

        def cancel(self) -> None:
            asked.append(0)

    monkeypatch.setattr(command, "Timer", Late)
    told = looked(write_rows(tmp_path / "some.jsonl", [{"prompt": "a ", "completion": "b"}]))
    assert told.err.count("rows are read and tokenised") == 1 and "rows are read" not in told.out
    assert asked == [command.PATIENCE, 0]


def test_a_screen_that_nobody_reads_any_more_ends_the_command() -> None:
    class Left(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Terminal(Left()).show([], Summary("", "", [], []), [], "")
