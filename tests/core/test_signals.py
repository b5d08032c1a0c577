"""Requests to stop, and processes that end with their parent: real ones, because signals end processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from loomtune.signals import StopRequest

PATIENCE = 60.0

LISTENING = """
import sys, signal
from loomtune.signals import StopRequest
stop = StopRequest()
stop.listen()
print("ready", flush=True)
for line in sys.stdin:
    print(stop.requested, flush=True)
"""

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""

CHILD = """
import time
from loomtune.signals import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(600)
"""


@contextmanager
def python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(process: subprocess.Popen[str], ask: bool = True) -> str:
    assert process.stdin is not None and process.stdout is not None
    if ask:
        process.stdin.write("\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_and_does_not_end(number: signal.Signals) -> None:
    with python(LISTENING) as process:
        assert said(process, ask=False) == "ready"
        assert said(process) == "False"
        process.send_signal(number)
        assert said(process) == "True"


def test_a_second_signal_ends_the_process_but_a_repeated_warning_does_not() -> None:
    with python("import loomtune.signals; loomtune.signals.TOGETHER = 0.0\n" + LISTENING) as process:
        said(process, ask=False)
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
            assert said(process) == "True"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 1


def test_what_a_scheduler_and_torchrun_say_at_once_is_one_request() -> None:
    with python("import loomtune.signals; loomtune.signals.TOGETHER = 60.0\n" + LISTENING) as process:
        said(process, ask=False)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            process.send_signal(number)
            assert said(process) == "True"


def test_a_file_asks_once_the_rank_that_looks_for_it(tmp_path: Path) -> None:
    stop, other = StopRequest(), StopRequest()
    stop.file = tmp_path / "stop"
    assert not stop.requested
    stop.file.touch()
    assert not other.requested, "a rank that looks for none"
    assert stop.requested and not stop.file.exists(), "taken away, or the next start would leave too"
    assert stop.requested, "heard is heard"


ADOPTED = """
import os, subprocess, sys, time
from pathlib import Path
import ctypes
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # so that what is left behind becomes ours
out = Path(sys.argv[1])
middle = subprocess.Popen([sys.executable, "-c", sys.argv[2], str(out)])
middle.wait()  # it is gone before its child asks
(out / "gone").touch()
os.wait()
"""

GONE = """
import os, subprocess, sys
from pathlib import Path
code = "import sys, time; from pathlib import Path; out = Path(sys.argv[1])\\n"
code += "while not (out / 'gone').exists(): time.sleep(0.01)\\n"
code += "from loomtune.signals import die_with_parent; die_with_parent(); (out / 'lived').touch()"
subprocess.Popen([sys.executable, "-c", code, sys.argv[1]], env=os.environ | {"LOOMTUNE_PARENT": str(os.getpid())})
"""

WRAPPED = """
import os, subprocess, sys
code = "from loomtune.signals import die_with_parent; die_with_parent(); print('lives')"
told = os.environ | {"LOOMTUNE_PARENT": str(os.getpid())}
subprocess.run(["sh", "-c", '"$0" -c "$1"; true', sys.executable, code], env=told)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")


@linux
def test_a_process_whose_parent_ended_before_it_could_ask_ends_too(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ADOPTED, str(tmp_path), GONE], timeout=PATIENCE, check=True)
    assert (tmp_path / "gone").exists() and not (tmp_path / "lived").exists()


@linux
def test_a_wrapper_between_the_agent_and_a_rank_is_no_missing_parent() -> None:
    done = subprocess.run([sys.executable, "-c", WRAPPED], timeout=PATIENCE, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "lives"


AGENT = """
import subprocess, sys, time
code = "from loomtune.signals import end_stuck_agent; end_stuck_agent(1.0)"
rank = subprocess.Popen([sys.executable, "-c", code])
while rank.poll() is None:
    time.sleep(float(sys.argv[1]))
"""


@linux
@pytest.mark.parametrize(
    ("name", "nap", "ends"), [("torchrun", 60, True), ("torchrun", 0.1, False), ("slurmstepd", 5, False)]
)
def test_only_an_agent_of_torchrun_that_does_nothing_is_ended(name: str, nap: float, ends: bool) -> None:
    command = [sys.executable, "-c", AGENT, str(nap), name]
    done = subprocess.run(command, timeout=PATIENCE, check=False, capture_output=True, text=True)
    assert (done.returncode == -signal.SIGKILL) == ends == ("it is ended" in done.stderr), done.stderr


@linux
def test_a_process_ends_with_its_parent_also_in_a_session_of_its_own() -> None:
    with python(PARENT, CHILD) as parent:
        child = psutil.Process(int(said(parent, ask=False)))
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        gone, _ = psutil.wait_procs([child], timeout=PATIENCE)
        assert gone


def test_the_end_is_at_once_and_loses_no_word() -> None:
    code = "import sys, threading, time; from loomtune.signals import end\n"
    code += "threading.Thread(target=time.sleep, args=(600,)).start(); sys.stdout.write('done'); end(7)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (7, "done")
