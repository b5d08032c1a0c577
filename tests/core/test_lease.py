import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from loomtune.errors import LeaseLost
from loomtune.lease import Lease


def test_the_attempt_that_took_the_lease_may_write(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path / "run")
    lease.check()
    Lease(tmp_path / "run", lease.attempt).check()


def test_a_newer_attempt_supersedes_the_older_and_is_named(tmp_path: Path) -> None:
    older = Lease.take(tmp_path)
    newer = Lease.take(tmp_path)
    newer.check()
    with pytest.raises(LeaseLost, match=rf"attempt {newer.attempt} \(process {os.getpid()} on "):
        older.check()


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_without_a_readable_lease_nobody_may_write(tmp_path: Path, content: str | None) -> None:
    lease = Lease.take(tmp_path)
    (tmp_path / "lease").unlink()
    if content is not None:
        (tmp_path / "lease").write_text(content)
    with pytest.raises(LeaseLost, match="no attempt may write"):
        lease.check()


def test_the_lease_shows_where_the_folder_is_shared_if_need_be_after_some_time(tmp_path: Path) -> None:
    mine = Lease.take(tmp_path / "here")
    assert Lease(tmp_path / "here", mine.attempt).shows(0)
    assert not Lease(tmp_path / "elsewhere", mine.attempt).shows(0.3)
    assert not Lease(tmp_path / "here", "another attempt").shows(0)
    late = threading.Timer(0.3, shutil.copytree, (tmp_path / "here", tmp_path / "late"))
    late.start()
    assert Lease(tmp_path / "late", mine.attempt).shows(30)
    late.join()


def test_a_lease_says_who_holds_it(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    holder = json.loads((tmp_path / "lease").read_text())
    assert (holder["attempt"], holder["pid"]) == (lease.attempt, os.getpid())
    assert sorted(holder) == ["attempt", "host", "pid", "time"]
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_who_reads_while_the_lease_changes_hands_sees_the_old_or_the_new(tmp_path: Path) -> None:
    older = Lease.take(tmp_path)
    with (tmp_path / "lease").open() as reading:
        Lease.take(tmp_path)
        assert json.loads(reading.read())["attempt"] == older.attempt
