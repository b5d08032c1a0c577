"""Tokenising on all cores: who did it does not show, and nobody stays behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from letters import Letters, Pairs, Rows, beside, row
from loomtune.beside import Beside
from loomtune.contracts import Row
from loomtune.errors import UserError
from loomtune.samples import Source, crew, prepare
from loomtune.samples.stored import ABOUT, COLUMNS
from support import shared

ROWS = [row(f"ask {number}", "yes" * (number % 7 + 1), "no", m=float(number)) for number in range(4000)]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes are started at once."""
    gather = crew.Crew._gather

    def gathered(self: crew.Crew) -> None:
        gather(self)
        Waits.begun = bool(self._members)

    monkeypatch.setattr(Waits, "begun", False)
    monkeypatch.setattr(crew.Crew, "_gather", gathered)
    monkeypatch.setattr(crew, "ALONE", -1.0)
    monkeypatch.setenv("LOOMTUNE_WORKERS", "2")


class Waits(Rows):
    """Rows that come ever more slowly until other processes have begun."""

    begun = False

    def rows(self, split: str) -> Iterator[Row]:
        for number, one in enumerate(self.rows_of):
            if number < 1280 and number % 128 == 0 and not Waits.begun:
                time.sleep(0.1 * 2 ** (number // 128))
            yield one


def source(rows: list[Row], objective: Pairs | None = None) -> Source:
    return Source(Waits(rows), objective or Pairs(), Letters(), "train", 100)


def alone(rows: list[Row], folder: Path) -> dict[str, bytes]:
    """The files that one process makes."""
    made = prepare(replace(source(rows), data=Rows(rows)), folder, 256)
    return {name: (made.folder / name).read_bytes() for name in (*COLUMNS, ABOUT)}


@pytest.mark.usefixtures("two")
def test_several_processes_make_what_one_makes_to_the_byte(tmp_path: Path) -> None:
    objective = Pairs()
    made = prepare(source(ROWS, objective), tmp_path / "two", 256)
    assert len(made) == 4000
    assert 0 < len(objective.here) < 2000, "most rows were sent away"
    assert {name: (made.folder / name).read_bytes() for name in (*COLUMNS, ABOUT)} == alone(ROWS, tmp_path / "one")
    assert not beside(), "and the processes are gone"


@pytest.mark.usefixtures("two")
def test_rows_that_are_refused_are_told_as_one_process_tells_them(tmp_path: Path) -> None:
    rows = [one if number % 1500 else {"origin": f"rows.jsonl:{number + 1}"} for number, one in enumerate(ROWS)]
    rows[2000] = row("a", "", "")
    told = []
    for each in (source(rows), replace(source(rows), data=Rows(rows))):
        with pytest.raises(UserError) as error:
            prepare(each, tmp_path, 256)
        told.append(str(error.value))
    assert told[0] == told[1]
    assert "4 of 4000 rows" in told[0] and "rows.jsonl:3001: has no prompt" in told[0]
    assert "train:2001: has nothing to learn" in told[0], "rows without a place of their own are numbered"


@pytest.mark.usefixtures("two")
def test_a_process_that_is_killed_loses_no_row(tmp_path: Path) -> None:
    rows = [*ROWS[:3000], row("poison"), *ROWS[3000:]]
    objective = Pairs(dies=os.getpid())
    made = prepare(source(rows, objective), tmp_path / "two", 256)
    assert "poison" in objective.here
    assert {name: (made.folder / name).read_bytes() for name in (*COLUMNS, ABOUT)} == alone(rows, tmp_path / "one")


@pytest.mark.usefixtures("two")
def test_what_cannot_be_sent_is_done_here(tmp_path: Path) -> None:
    class Local(Pairs):
        """Of no module: pickle cannot name it."""

    objective = Local()
    assert len(prepare(replace(source([], objective), data=Rows(ROWS[:2000])), tmp_path, 256)) == 2000
    assert len(objective.here) == 2000


@pytest.mark.usefixtures("two")
def test_an_interruption_ends_the_processes_at_once(tmp_path: Path) -> None:
    started: list[psutil.Process] = []

    class Interrupted(Rows):
        def rows(self, split: str) -> Iterator[Row]:
            yield from super().rows(split)
            started.extend(beside())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(replace(source(ROWS), data=Interrupted(ROWS)), tmp_path, 256)
    assert len(started) == 2 and not any(process.is_running() for process in started)
    assert list(tmp_path.iterdir()) == []


DIES = """
import sys
from loomtune.beside import Beside
beside = Beside("letters:busy")
print(beside.process.pid, flush=True)
sys.stdin.read()
"""


def test_a_process_ends_with_the_one_beside_it_and_hears_no_other_signal() -> None:
    here = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", DIES], env=here, **pipes) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        while not {signal.SIGINT, signal.SIGTERM} <= _ignored(worker.pid):
            time.sleep(0.02)
        for number in (signal.SIGINT, signal.SIGTERM):
            worker.send_signal(number)
        with pytest.raises(psutil.TimeoutExpired):
            worker.wait(0.3)
        parent.kill()
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert not alive


def _ignored(process: int) -> set[int]:
    """The signals that it ignores."""
    status = Path(f"/proc/{process}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    return {number for number in range(1, 64) if mask >> (number - 1) & 1}


def test_a_worker_needs_no_torch() -> None:
    from loomtune.samples.making import Encoder
    from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer
    from loomtune_plugins.objectives.sft import Sft
    from loomtune_plugins.objectives.sft_settings import SftSettings

    encoder = Encoder(Sft(SftSettings()), HuggingFaceTokenizer(shared("models", "stories260k")), 100)
    other = Beside("letters:modules")
    other.pipe.send(pickle.loads(pickle.dumps(encoder)))
    known = other.pipe.recv()
    other.close()
    assert "transformers" in known and "torch" not in known


def test_the_number_of_processes_is_that_of_the_cores_or_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOOMTUNE_WORKERS", raising=False)
    assert crew.workers() == len(os.sched_getaffinity(0))
    assert crew.workers(most=1) == 1, "unless the environment says more"
    monkeypatch.setenv("LOOMTUNE_WORKERS", "7")
    assert crew.workers() == crew.workers(most=1) == 7


@pytest.mark.parametrize("said", ["-3", "0", "abc", "nan"])
def test_a_number_of_processes_that_is_none_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOMTUNE_WORKERS", said)
    with pytest.raises(UserError, match=f"LOOMTUNE_WORKERS={said} is no number from 1"):
        crew.workers()


@pytest.mark.usefixtures("two")
def test_what_is_larger_than_a_pipe_holds_up_no_row_before_the_others_listen() -> None:
    objective = Pairs(version="v" * 10_000_000)
    team = crew.Crew(source([], objective).encoder)
    began = time.monotonic()
    team._gather()
    took = time.monotonic() - began
    assert not team._members and took < 0.5, "a process takes longer to begin"
    team.close()


def test_a_small_split_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> Beside:
        raise AssertionError("a process is started")

    monkeypatch.setenv("LOOMTUNE_WORKERS", "2")
    monkeypatch.setattr(crew, "Beside", none)
    assert len(prepare(replace(source(ROWS), data=Rows(ROWS)), tmp_path, 256)) == 4000
