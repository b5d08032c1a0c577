"""The cache of samples, whatever happens to it: several writers, sudden ends, damage, disks that take no more."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from letters import Letters, Pairs, Rows, row
from loomtune.contracts import Row
from loomtune.errors import UserError
from loomtune.samples import Samples, Source, cache, prepare
from loomtune.samples.stored import ABOUT, COLUMNS

ROWS = [row(f"ask {number}", "yes" * (number % 5 + 1), "no", m=float(number)) for number in range(300)]

FORK = multiprocessing.get_context("fork")


def made(folder: Path, rows: list[Row] | Rows = ROWS, **change: object) -> Samples:
    data = rows if isinstance(rows, Rows) else Rows(rows)
    return prepare(Source(data, Pairs(**change), Letters(), "train", 100), folder, 256)  # type: ignore[arg-type]


def content(samples: Samples) -> list[object]:
    return [
        (samples.origin(i), samples[i].numbers, [segment.tokens.tolist() for segment in samples[i].segments])
        for i in range(len(samples))
    ]


def in_process(work: Callable[[], object]) -> int:
    """The exit code of a process that does it: 0, or less where a signal ended it."""
    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def _asked(folder: str, start: str, number: int) -> list[object]:
    """What a process gets that asks for one of two keys, at the same moment as others."""
    while not Path(start).exists():
        pass
    return content(made(Path(folder), version=str(number % 2)))


def test_processes_that_write_two_keys_at_once_over_a_damaged_one_all_get_what_they_asked_for(tmp_path: Path) -> None:
    folder, start = tmp_path / "cache", tmp_path / "start"
    harmed = folder / made(folder, version="0").key / "tokens"
    harmed.write_bytes(b"\1" + harmed.read_bytes()[1:])
    with FORK.Pool(6) as pool:
        waiting = [pool.apply_async(_asked, (str(folder), str(start), number)) for number in range(6)]
        start.touch()
        answers = [each.get(60) for each in waiting]
    assert all(answer == content(made(tmp_path / "other")) for answer in answers)
    assert len(list(folder.iterdir())) == 2, "nothing is left of those that were slower"


class Ends(Rows):
    """Rows in the middle of which the process is killed."""

    def rows(self, split: str) -> Iterator[Row]:
        yield from self.rows_of[:200]
        os.kill(os.getpid(), signal.SIGKILL)


def _killed_at(folder: Path, where: str, turn: int) -> None:
    """Asks for samples, and is killed when a function of the system is called for the turn-th time."""
    real, calls = getattr(os, where), iter(range(1000))

    def mortal(*arguments: object, **more: object) -> object:
        if next(calls) == turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    setattr(os, where, mortal)
    made(folder)


@pytest.mark.parametrize(
    ("where", "turn"),
    [("mkdir", 1), ("fsync", 0), ("fsync", len(COLUMNS)), ("open", 0), ("rename", 0)],
    ids=["folder", "first column", "last file", "lock", "rename"],
)
def test_a_writer_that_is_killed_anywhere_leaves_no_key_and_is_no_hindrance(
    tmp_path: Path, where: str, turn: int
) -> None:
    assert in_process(lambda: _killed_at(tmp_path, where, turn)) == -signal.SIGKILL
    left = [entry.name for entry in tmp_path.iterdir()]
    assert all(name.startswith(".unfinished-") for name in left)
    assert len(made(tmp_path)) == 300


def test_a_writer_that_is_killed_among_its_rows_leaves_no_key_and_is_no_hindrance(tmp_path: Path) -> None:
    assert in_process(lambda: made(tmp_path, Ends(ROWS))) == -signal.SIGKILL
    assert [entry.name[:12] for entry in tmp_path.iterdir()] == [".unfinished-"]
    assert len(made(tmp_path)) == 300


def test_what_replaces_a_damaged_folder_may_be_killed_in_between(tmp_path: Path) -> None:
    """The damaged one is put aside by the first rename; the second gives the new one its name."""
    harmed = tmp_path / made(tmp_path).key / "origins"
    harmed.write_bytes(harmed.read_bytes()[:-1])
    assert in_process(lambda: _killed_at(tmp_path, "rename", 1)) == -signal.SIGKILL
    assert not harmed.exists()
    assert len(made(tmp_path)) == 300


@pytest.mark.parametrize("name", [*COLUMNS, ABOUT])
def test_a_byte_that_changes_in_any_file_is_noticed(tmp_path: Path, name: str) -> None:
    data = Rows(ROWS)
    folder = tmp_path / made(tmp_path, data).key
    whole = bytearray((folder / name).read_bytes())
    for place in (0, len(whole) // 2, len(whole) - 1):
        whole[place] ^= 4
        (folder / name).write_bytes(whole)
        data.read = 0
        made(tmp_path, data)
        assert data.read == 1, f"byte {place}"


def test_a_number_that_changes_among_what_is_known_is_noticed(tmp_path: Path) -> None:
    data = Rows(ROWS)
    about = tmp_path / made(tmp_path, data).key / ABOUT
    about.write_text(about.read_text().replace('"cut": 0', '"cut": 7'))
    assert made(tmp_path, data).cut == 0 and data.read == 2


def test_a_file_too_many_is_nobodys_business(tmp_path: Path) -> None:
    data = Rows(ROWS)
    folder = tmp_path / made(tmp_path, data).key
    (folder / "tokens.bak").write_bytes(b"anything")
    (folder / "more").mkdir()
    assert content(made(tmp_path, data)) == content(made(tmp_path / "other"))
    assert data.read == 1


def test_a_file_in_the_place_of_a_folder_is_put_away(tmp_path: Path) -> None:
    key = made(tmp_path / "other").key
    (tmp_path / key).write_text("no folder")
    assert len(made(tmp_path)) == 300


def test_bytes_are_read_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    real = cache.is_written
    monkeypatch.setattr(cache, "is_written", lambda folder: not reads.append(folder) and real(folder))
    folder = tmp_path / made(tmp_path).key
    monkeypatch.setattr(cache, "SETTLED", 3600.0)
    made(tmp_path)
    made(tmp_path)
    assert len(reads) == 2, "a file that was written a moment ago may be written again without its time showing it"
    monkeypatch.setattr(cache, "SETTLED", -1.0)
    for _ in range(3):
        made(tmp_path)
    assert len(reads) == 3
    os.utime(folder / "lengths", (0, 0))  # back-dated, as a copy or an attack might be
    made(tmp_path)
    made(tmp_path)
    assert len(reads) == 4


def test_a_cache_that_cannot_be_written_to_is_named_with_what_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be kept in .*file/cache.*\n.*LOOMTUNE_CACHE"):
        made(tmp_path / "file" / "cache")


def _on_a_full_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        made(folder)
    except UserError as error:
        os._exit(20 if "LOOMTUNE_CACHE" in str(error) and str(folder) in str(error) else 21)


def test_a_disk_that_takes_no_more_is_told_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    assert in_process(lambda: _on_a_full_disk(tmp_path)) == 20
    assert list(tmp_path.iterdir()) == []


def test_what_the_data_fail_with_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    class Gone(Rows):
        def rows(self, split: str) -> Iterator[Row]:
            raise OSError("the data are gone")
            yield

    with pytest.raises(OSError, match="the data are gone"):
        made(tmp_path, Gone(ROWS))


def test_a_cache_that_can_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = content(made(tmp_path))
    monkeypatch.setattr(cache, "SETTLED", -1.0)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    assert content(made(tmp_path)) == first
