"""What ranks say, from their pipes to one text in order of time: nothing is lost, and nothing breaks it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loomtune_launchers.watching import pipes, ranklogs
from loomtune_launchers.watching.pipes import Pipes


@contextmanager
def written(folder: Path, log: Path, echo: bool = False) -> Iterator[tuple[int, int]]:
    """Descriptors of a rank's output and errors, whose pipes are emptied at the end."""
    folder.mkdir()
    opened = Pipes(folder, "node7")
    out, err = (os.open(path, os.O_WRONLY) for path in opened.rank(3, log, echo))
    opened.start()
    try:
        yield out, err
    finally:
        os.close(out)
        os.close(err)
        opened.finish()


def raw(log: Path, stream: str) -> bytes:
    """The bytes that a rank wrote to a stream, from its records."""
    parts = [line.split(b" ", 3) for line in log.read_bytes().split(b"\n")[:-1]]
    wanted = [(kind, text) for _, _, kind, text in parts if kind.lower() == stream.encode()]
    return b"".join(text + (b"" if kind.isupper() else b"\n") for kind, text in wanted)


@pytest.mark.parametrize(
    "said",
    [
        b"one\ntwo\n\nfour\n",
        b"no end",
        b"\xff\xfe\x00 not text \x80\n\x85\xe2\x80\xa8 other kinds of line ends \x0b\x0c\x1c\r\n",
        b"\r 10%\r 20%\r100%\n",
        b"x" * (3 * pipes.LONGEST + 17) + b"\nafter\n",
        b"2026-11-22T19:38:18.123456Z node7 o looks like a record\n",
    ],
    ids=["lines", "no end", "no text", "a bar", "a long line", "like a record"],
)
def test_every_byte_can_be_had_again(said: bytes, tmp_path: Path) -> None:
    log = tmp_path / "run" / "logs" / "one" / "3" / "output.log"
    with written(tmp_path / "node", log) as (out, err):
        for start in range(0, len(said), 50_000):
            os.write(out, said[start : start + 50_000])
        os.write(err, said[::-1][:4096])
    assert raw(log, "o") == said
    assert raw(log, "e") == said[::-1][:4096]
    records = list(ranklogs.Tail(log))
    assert {(record.rank, record.host) for record in records} == {(3, "node7")}
    assert [record.stamp for record in records] == sorted(record.stamp for record in records)


def test_the_beginning_of_a_line_is_written_when_its_rank_falls_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "QUIET", 0.02)
    log = tmp_path / "3" / "output.log"
    with written(tmp_path / "node", log) as (out, _):
        os.write(out, b"loading ...")
        while not log.exists():
            threading.Event().wait(0.01)
        (record,) = ranklogs.Tail(log)
        assert (record.text, record.stream) == ("loading ...", "O")


def test_the_first_rank_is_repeated_as_it_spoke(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with written(tmp_path / "node", tmp_path / "3" / "output.log", echo=True) as (out, err):
        os.write(out, b"\r 10%\r 20%")
        os.write(err, b"warning")
    heard = capfd.readouterr()
    assert (heard.out, heard.err) == ("\r 10%\r 20%", "warning")


def test_a_disk_that_is_full_ends_no_run_and_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "output.log").symlink_to("/dev/full")
    with written(tmp_path / "node", tmp_path / "3" / "output.log") as (out, _):
        for _ in range(40):
            os.write(out, b"x" * 100_000 + b"\n")
    assert capfd.readouterr().err.count("cannot be written") == 1


def test_a_process_that_ends_is_heard_of_at_once(tmp_path: Path) -> None:
    heard = threading.Event()
    with written(tmp_path / "node", tmp_path / "3" / "output.log"):
        opened = Pipes(tmp_path)
        opened.start()
        pid = os.spawnlp(os.P_NOWAIT, "true", "true")
        opened.watch(pid, lambda when: heard.set())
        assert heard.wait(30)
        os.waitpid(pid, 0)
        opened.finish()


def record(second: float, text: str, host: str = "a") -> str:
    return f"{ranklogs.stamp(1_000_000_000 + second)} {host} o {text}\n"


def test_ranks_of_several_nodes_are_one_text_in_order_of_time(tmp_path: Path) -> None:
    for rank, lines in {0: [(0.5, "first"), (2.0, "third")], 10: [(1.25, "second"), (3.0, "fourth")]}.items():
        folder = tmp_path / "logs" / "one" / str(rank)
        folder.mkdir(parents=True)
        said = "".join(record(second, text, f"node{rank}") for second, text in lines)
        (folder / "output.log").write_text(said + "torn")
        (folder / "error.json").write_text("{}")
    assert list(ranklogs.merged(tmp_path)) == [
        "01:46:40.500 rank 0 node0 | first",
        "01:46:41.250 rank 10 node10 | second",
        "01:46:42.000 rank 0 node0 | third",
        "01:46:43.000 rank 10 node10 | fourth",
    ]


def test_the_newest_attempt_is_shown_and_restarts_of_it_are_numbered(tmp_path: Path) -> None:
    for name in ("one", "one.2", "one.10"):
        folder = tmp_path / "logs" / name / "0"
        folder.mkdir(parents=True)
        (folder / "output.log").write_text(record(0, f"of {name}"))
        os.utime(folder.parent, (5, 5))
    assert [path.name for path in ranklogs.attempts(tmp_path)] == ["one", "one.2", "one.10"]
    assert [line.split(" | ")[1] for line in ranklogs.merged(tmp_path)] == ["of one.10"]
    assert list(ranklogs.merged(tmp_path / "nothing")) == []


def test_names_of_attempts_are_taken_once(tmp_path: Path) -> None:
    names = [ranklogs.begin(tmp_path, "job-7").name for _ in range(3)]
    assert names == ["job-7", "job-7.1", "job-7.2"]
    assert ranklogs.named_by_time() > "2026"


def test_following_gives_each_line_once_and_goes_on_with_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranklogs, "EVERY", 0.0)
    old, new, later = (tmp_path / "logs" / name / "0" / "output.log" for name in ("a", "b", "c"))
    for path in (old, new):
        path.parent.mkdir(parents=True)
    old.write_text(record(0, "old"))
    new.write_text(record(1, "one") + record(2, "tw")[:-1])
    os.utime(old.parent.parent, (5, 5))
    looks = iter(range(10))

    def over() -> bool:
        look = next(looks)
        if look == 1:
            with new.open("a") as file:
                file.write("o\n")
        if look == 2:
            later.parent.mkdir(parents=True)
            later.write_text(record(3, "three"))
        return look == 3

    followed = [line.split(" | ")[-1] for line in ranklogs.merged(tmp_path, True, over)]
    assert followed == ["one", "two", "attempt c", "three"]


def test_what_somebody_else_wrote_into_a_log_is_shown_too(tmp_path: Path) -> None:
    path = tmp_path / "3" / "output.log"
    path.parent.mkdir()
    path.write_text(record(0, "ours", "node7") + "theirs\n")
    assert [(found.text, found.host) for found in ranklogs.Tail(path)] == [("ours", "node7"), ("theirs", "node7")]
    assert ranklogs.ending(path, 1) == ["theirs"] and ranklogs.ending(tmp_path / "none", 1) == []


def test_stamps_are_times() -> None:
    assert ranklogs.stamp(1_000_000_000.25) == "2001-09-09T01:46:40.250000Z"
    assert ranklogs.seconds("2001-09-09T01:46:40.250000Z") == 1_000_000_000.25
