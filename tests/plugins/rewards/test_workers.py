"""What scores may hang, crash, lie and grow: the others' answers are scored, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loomtune_plugins.rewards.scored import TOO_LONG, Failure, Scored
from loomtune_plugins.rewards.workers.pool import Pool

CODE = """
import ctypes, os, subprocess, sys, time

def score(what):
    if what == "endless":
        while True: pass
    if what == "sleep": time.sleep(600)
    if what == "locked": ctypes.PyDLL(None).sleep(600)
    if what == "exit": os._exit(3)
    if what == "quit": sys.exit()
    if what == "crash": ctypes.string_at(0)
    if what == "raise": raise ZeroDivisionError("no way")
    if what == "none": return None
    if what == "text": return "0.5"
    if what == "inf": return float("inf")
    if what == "nan": return float("nan")
    if what == "two": return [1.0, 2.0]
    if what == "flood": print("x" * 10**9); return 0.25
    if what == "shout": raise ValueError("x" * 10**8)
    if what == "grow": return float(len(bytearray(3 * 2**30)))
    if what == "copy": os.fork(); return 0.75
    if what == "child":
        if not os.fork():
            os.setsid(); time.sleep(600)
        return 0.125
    if what == "program": subprocess.Popen(["sleep", "600"]); return 0.125
    if what == "close": os.closerange(3, 100); return 1.0
    if what == "forge": os.write(max(map(int, os.listdir("/proc/self/fd"))) - 1, b"1.0\\\\n"); return 1.0
    if what == "true": return True
    return float(what)
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    (tmp_path / "mine.py").write_text(CODE.replace("\\\\n", "\\n"))
    made = Pool(target=f"{tmp_path}/mine.py:score", seconds=60.0, memory=2 << 30, workers=2)
    yield made
    made.close()


def scored(pool: Pool, *what: str) -> list[Scored]:
    return [scores[0] for scores in pool.call([(1, (one,)) for one in what])]


def below(parent: int) -> set[int]:
    """Processes that descend from one, wherever they have gone."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found = {parent}
    while more := {child for child, of in parents.items() if of in found} - found:
        found |= more
    return found - {parent}


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_scores_come_in_the_order_of_the_answers(pool: Pool) -> None:
    assert scored(pool, *map(str, range(200))) == list(map(float, range(200)))
    assert scored(pool, "true", "7") == [1.0, 7.0]


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("endless", TOO_LONG, "2 seconds"),
        ("sleep", TOO_LONG, "2 seconds"),
        ("locked", TOO_LONG, "2 seconds"),
        ("exit", "it ends its process", "exit code 3"),
        ("quit", "SystemExit", ""),
        ("crash", "it ends its process", "signal 11"),
        ("raise", "ZeroDivisionError", "no way"),
        ("none", "TypeError", "None"),
        ("text", "TypeError", "str"),
        ("inf", "ValueError", "inf"),
        ("nan", "ValueError", "nan"),
        ("two", "ValueError", "2 scores for 1"),
        ("shout", "ValueError", "xxx"),
        ("grow", "MemoryError", ""),
        ("close", "it ends its process", ""),
    ],
)
def test_an_answer_that_cannot_be_scored_says_why_and_takes_no_other_with_it(
    pool: Pool, what: str, kind: str, said: str
) -> None:
    pool.seconds = 2.0 if kind == TOO_LONG else 60.0
    found = scored(pool, *["1"] * 20, what, *["2"] * 20)
    assert found[:20] == [1.0] * 20 and found[21:] == [2.0] * 20
    failure = found[20]
    assert isinstance(failure, Failure) and failure.kind == kind and said in failure.said
    assert len(str(failure)) < 1000


def test_a_gigabyte_that_is_printed_goes_nowhere(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    assert scored(pool, "flood") == [0.25]
    assert capfd.readouterr() == ("", "")


def test_what_answers_in_the_workers_place_is_not_believed(pool: Pool) -> None:
    (found,) = scored(pool, "forge")
    assert isinstance(found, Failure) or found == 1.0
    assert scored(pool, "3") == [3.0]


def test_a_slow_answer_keeps_nobody_waiting_who_is_served_by_another_worker(pool: Pool) -> None:
    pool.seconds = 3.0
    before = time.monotonic()
    found = scored(pool, *["1"] * 15, "sleep", *["2"] * 300)
    assert found[16:] == [2.0] * 300 and isinstance(found[15], Failure)
    assert time.monotonic() - before < 30


def test_a_copy_of_the_worker_scores_nothing(pool: Pool) -> None:
    assert scored(pool, "copy", "1", "copy", "2") == [0.75, 1.0, 0.75, 2.0]


@pytest.mark.parametrize("what", ["child", "program"])
def test_what_an_answer_started_ends_with_the_workers(pool: Pool, what: str) -> None:
    others = set(below(os.getpid()))
    scored(pool, what)
    started = [process for process in below(os.getpid()) if process not in others]
    assert len(started) > 2, "a guardian, a worker, and what the worker started"
    pool.close()
    assert not [process for process in started if alive(process)]


def test_a_worker_that_hangs_ends_with_all_that_it_started(pool: Pool) -> None:
    before = below(os.getpid())
    pool.seconds = 2.0
    scored(pool, "child", "endless")
    pool.close()
    assert below(os.getpid()) <= before


def test_a_function_that_is_not_there_is_told_before_any_answer(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "good.py").write_text("number = 3\ndef f(x): return 1\n")
    said = {
        target: str(Pool(target=target).check())
        for target in (f"{tmp_path}/bad.py:f", f"{tmp_path}/good.py:g", f"{tmp_path}/good.py:number", "no.such:thing")
    }
    for words, told in zip(
        ("nothing_of_this_name", "no attribute 'g'", "no function", "No module"), said.values(), strict=True
    ):
        assert words in told
    assert Pool(target=f"{tmp_path}/good.py:f").check() is None
    (failures,) = Pool(target="no.such:thing").call([(2, ())])
    assert [isinstance(one, Failure) for one in failures] == [True, True]


def test_who_is_asked_to_leave_does_not_wait_for_the_rest(pool: Pool) -> None:
    pool.seconds = 600.0
    asked = iter([False, False])
    found = pool.call([(1, ("sleep",)), (1, ("1",))], lambda: next(asked, True))
    assert isinstance(found[0][0], Failure)
    assert scored(pool, "5") == [5.0]


INTERRUPTED = """
import os, signal, threading, sys
from loomtune_plugins.rewards.workers.pool import Pool
pool = Pool(target=sys.argv[1], seconds=600, workers=1)
pool.check()
if sys.argv[2] == "INT":
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
print("begun", flush=True)
try:
    pool.call([(1, ("child",)), (1, ("sleep",))])
except KeyboardInterrupt:
    print("interrupted", len(pool.processes), flush=True)
"""


@pytest.mark.parametrize("how", ["INT", "KILL"])
def test_nothing_is_left_of_a_run_that_is_interrupted_or_killed(tmp_path: Path, how: str) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), f"{tmp_path}/mine.py:score", how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        while len(started := below(process.pid)) < 3:
            time.sleep(0.05)
        if how == "KILL":
            process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == ("interrupted 0\n" if how == "INT" else "")
    until = time.monotonic() + 20
    while left := [one for one in started if alive(one)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)
