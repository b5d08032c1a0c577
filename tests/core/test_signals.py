"""Requests to stop, and processes that end with their parent: real ones, because signals end processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
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
