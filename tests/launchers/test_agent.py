"""The agent of a node: what ranks say is kept, who failed first is named, and no process of theirs stays."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from loomtune_launchers.watching import ranklogs, shadow

PATIENCE = 120.0

RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
how, run, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
again = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"this is rank {rank}, start {again}", file=sys.stderr, flush=True)

def failed(message):
    extra = {"py_callstack": f"Traceback\\n{message}", "timestamp": str(int(time.time()))}
    said = {"message": {"message": message, "extraInfo": extra}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(said))
    sys.exit(1)

def result(status, error):
    (run / "result.json").write_text(json.dumps({"status": status, "step": 3, "metrics": {}, "error": error}))

def together(name):
    (run / f"{name}.{rank}").touch()
    while len(list(run.glob(f"{name}.[01]"))) < 2:
        time.sleep(0.01)

if how == "code" and rank == 1:
    print("the warp is torn", file=sys.stderr, flush=True)
    sys.exit(7)
if how in ("killed", "raises"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as real ranks, which take it for a request
if how == "killed":
    together("there")
    if rank == 1:
        os.kill(os.getpid(), 9)
    time.sleep(0.2)
    failed("ConnectionError: closed by peer")
if how == "raises":
    together("there")
    if rank == 1:
        failed("ValueError: the warp is torn")
    time.sleep(0.2)
    result("failed", "ConnectionError")
    failed("ConnectionError: closed by peer")
if how == "once" and not again:
    (run / "result.json").write_text("{}")
    sys.exit(rank)
if how == "user":
    sys.exit(2)
if how == "preempted":
    together("there")
    if rank == 0:
        time.sleep(0.7)
        result("preempted", None)
    sys.exit(75)
if how == "leaves":
    program = "import time; time.sleep(600)"
    left = subprocess.Popen([sys.executable, "-S", "-c", program], start_new_session=True)
    bare = subprocess.Popen([sys.executable, "-S", "-c", program], start_new_session=True, env={})
    (run / f"left.{rank}").write_text(f"{left.pid} {bare.pid}")
if how in ("leaves", "well", "once"):
    sys.exit(0)
if how == "dies":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    left = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    (run / f"left.{rank}").write_text(f"{os.getpid()} {left.pid}")
if how in ("hangs", "stops"):
    from types import SimpleNamespace
    from loomtune_plugins.guards.settings import StallSettings
    from loomtune_plugins.guards.stall import Stall
    guard = Stall(StallSettings(seconds=1.0 if again == 0 else 60))
    guard.started(SimpleNamespace(folder=run, world=SimpleNamespace(rank=rank), step=0))
    together(f"there{again}")
    guard.judge(4, 1.0, 1.0)
    def reads_a_file_that_never_comes():
        while True:
            time.sleep(0.1)
    if again:
        guard.finished(None)
        sys.exit(0)
    if rank and how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank:
        reads_a_file_that_never_comes()
    exec(compile("while True: sleep(0.1)", "/x/torch/distributed.py", "exec"), {"sleep": time.sleep})
if how == "asked":
    signal.signal(signal.SIGUSR1, lambda number, frame: None if (run / "stays").exists() else sys.exit(75))
    (run / f"left.{rank}").write_text(str(os.getpid()))
time.sleep(600)
"""


ALONE = ("--standalone", "--nproc-per-node=2")


@contextmanager
def agent(run: Path, how: str, *options: str, group: Sequence[str] = ALONE) -> Iterator[subprocess.Popen[str]]:
    """An agent of ranks that behave in some way, two in all."""
    run.mkdir(exist_ok=True)
    (run.parent / "rank.py").write_text(RANK)
    torchrun = [*group, *options, str(run.parent / "rank.py"), how, str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "loomtune_launchers.agent", str(run), "auto", *torchrun],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(run.parent), "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(run: Path, how: str, *options: str) -> tuple[int, str]:
    """Exit code and standard error of an agent that has ended, and left nothing in the node's temporary folder."""
    with agent(run, how, *options) as process:
        _, said = process.communicate(timeout=PATIENCE)
    assert not list(run.parent.glob("loomtune-*")), "the node's temporary folder went with the agent"
    return process.returncode, said


def wait(until: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < PATIENCE, "it did not come to pass"
        time.sleep(0.02)


def left(run: Path, ranks: int = 2) -> list[int]:
    """Processes that ranks said they would leave."""
    wait(lambda: len([path for path in run.glob("left.?") if path.read_text()]) == ranks)
    return [int(pid) for path in run.glob("left.?") for pid in path.read_text().split()]


def gone(pids: Sequence[int]) -> bool:
    """Whether all have ended, at once or soon."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    living = [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    return not psutil.wait_procs(living, timeout=PATIENCE / 4)[1]


def result(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "result.json").read_text())
    return found


def test_what_ranks_say_is_kept_and_only_the_first_speaks_for_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, said = ended(run, "leaves")
    assert code == 0 and "this is rank 0, start 0\n" in said and "rank 1" not in said
    lines = sorted(line.split(" | ")[1] for line in ranklogs.merged(run))
    assert lines == ["this is rank 0, start 0", "this is rank 1, start 0"]
    assert gone(left(run)), "what ranks leave behind ends with them"


@pytest.mark.slow
def test_a_rank_that_says_nothing_is_named_by_its_exit_code_which_is_the_agents(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, said = ended(run, "code")
    assert code == 7 and "Traceback" not in said
    assert (
        "the first to fail was rank 1 on " in said and "ended with exit code 7" in said and "the warp is torn" in said
    )
    assert "exit code 7" in str(result(run)["error"]) and result(run)["status"] == "failed"


@pytest.mark.parametrize("how", ["raises", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_peer_that_lost_it_is_not_taken_for_the_one_that_failed(how: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, said = ended(run, how)
    cause = "ValueError: the warp is torn" if how == "raises" else "signal 9 (SIGKILL)"
    assert "the first to fail was rank 1 on " in said and cause in said
    assert cause in str(result(run)["error"]), "what rank 0 said of its peers is not the cause"
    assert result(run)["step"] == (3 if how == "raises" else 0)


def test_a_group_that_failed_starts_again_in_an_attempt_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, said = ended(run, "once", "--max-restarts=2")
    assert code == 0 and "rank 1 on " in said and "from the last checkpoint again, 1 of 2" in said
    first, second = ranklogs.attempts(run)
    assert second.name == f"{first.name}.1"
    assert not (run / "result.json").exists(), "what the failed attempt said is not how the run ended"
    assert {line.split(" | ")[1] for line in ranklogs.merged(run)} == {
        f"this is rank {rank}, start 1" for rank in (0, 1)
    }


@pytest.mark.parametrize(("how", "expected"), [("preempted", 75), pytest.param("user", 2, marks=pytest.mark.slow)])
def test_what_left_on_purpose_is_not_started_again(how: str, expected: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, _ = ended(run, how, "--max-restarts=3")
    assert code == expected and len(ranklogs.attempts(run)) == 1
    if how == "preempted":
        assert result(run)["status"] == "preempted", "rank 0 had the time to say so"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_to_leave_is_handed_on_and_who_does_not_leave_is_ended(number: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if number == signal.SIGTERM:
        (run / "stays").touch()
    with agent(run, "asked", "--shutdown-timeout=1") as process:
        pids = left(run)
        process.send_signal(number)
        assert process.wait(PATIENCE) == 75
        assert gone(pids)
    if number == signal.SIGTERM:
        assert result(run)["status"] == "preempted", "it is to go on, though it did not save in time"


@pytest.mark.slow
def test_the_nodes_of_a_job_share_an_attempt_and_the_cause(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = ["--nnodes=2", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=x", "--rdzv-backend=c10d"]
    run = tmp_path / "run"
    with agent(run, "raises", group=group) as one, agent(run, "raises", group=group) as other:
        said = [process.communicate(timeout=PATIENCE)[1] for process in (one, other)]
    (attempt,) = ranklogs.attempts(run)
    assert sorted(path.name for path in attempt.iterdir()) == ["0", "1"]
    assert all("the first to fail was rank 1 on " in text for text in said)
    assert "ValueError: the warp is torn" in str(result(run)["error"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "why"), [("hangs", "in reads_a_file_that_never_comes"), ("stops", "state T (stopped)")]
)
def test_ranks_that_make_no_step_say_where_they_are_and_the_one_they_wait_for_is_named(
    how: str, why: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, said = ended(run, how, "--max-restarts=1")
    assert code == 0, said
    assert "rank 1 on " in said and "s after step 4: " in said and why in said
    assert "from the last checkpoint again, 1 of 1" in said
    first, _ = ranklogs.attempts(run)
    stacks = [(first / str(rank) / "stacks.txt").read_text() for rank in (0, 1)]
    assert "/x/torch/distributed.py" in stacks[0] and "kernel: " in stacks[0]
    assert ("it did not write its stacks" in stacks[1]) is (how == "stops") and "rank 1, process " in stacks[1]


def test_a_killed_agent_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with agent(run, "dies") as process:
        pids = left(run)
        process.kill()
        process.wait()
        assert gone(pids), "ranks, and what they started in sessions of their own"
    wait(lambda: not list(tmp_path.glob("loomtune-*")))


@pytest.mark.slow
def test_an_agent_whose_watcher_was_killed_clears_away_by_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with agent(run, "dies", "--shutdown-timeout=1") as process:
        pids = left(run)
        (watcher,) = [one for one in psutil.Process(process.pid).children() if shadow.__file__ in one.cmdline()]
        watcher.kill()
        process.terminate()
        process.communicate(timeout=PATIENCE)
        assert gone(pids) and not list(tmp_path.glob("loomtune-*"))


def test_the_mark_is_found_in_the_environment_of_whoever_inherited_it() -> None:
    sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    with (
        subprocess.Popen(sleeper, env={shadow.VARIABLE: "mine"}) as mine,
        subprocess.Popen(sleeper, env={shadow.VARIABLE: "mine too"}) as other,
    ):
        wait(lambda: shadow.marked("mine") == [mine.pid])
        shadow.end_marked("mine")
        assert mine.wait(PATIENCE) == -signal.SIGKILL and other.poll() is None
        other.kill()


def test_on_a_full_disk_the_agent_itself_says_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from loomtune_launchers import agent as node

    group = node.Group(tmp_path, tmp_path, "no process has this mark")
    group.attempt = Path("/dev/null/attempt")
    assert node._ended(group, {1: 7, 3: -9}) == 7
    said = capsys.readouterr().err
    assert said.startswith("loomtune: rank 1 ended with exit code 7\nloomtune: rank 3 ended by signal 9")
    assert node._ended(group, {}) == 1 and not capsys.readouterr().err


@pytest.mark.parametrize(("apart", "sent"), [(0.0, ["SIGUSR1", "SIGKILL"]), (60.0, ["SIGUSR1"])])
def test_who_asks_again_while_ranks_leave_has_them_ended_but_not_with_the_same_request(
    apart: float, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loomtune_launchers import agent as node

    seen: list[str] = []

    def close(number: signal.Signals, timeout: int) -> None:
        seen.append(number.name)
        if number == signal.SIGUSR1:
            time.sleep(0.01)
            raise SignalException("asked again", signal.SIGTERM)

    monkeypatch.setattr(node, "TOGETHER", apart)
    one = object.__new__(node.NodeAgent)
    one._worker_watchdog = one._health_check_server = None
    one._pcontext = SimpleNamespace(close=close)  # type: ignore[assignment]
    with pytest.raises(SignalException):
        one._shutdown(signal.SIGTERM, timeout=30)
    assert seen == sent
