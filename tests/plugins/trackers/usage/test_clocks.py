"""The host's clock tells sleep from work."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loomtune_plugins.trackers.usage import clocks
from loomtune_plugins.trackers.usage.clocks import HostClock, slept, wall


def during(work: Callable[[], object]) -> tuple[float, float]:
    clock = HostClock()
    begin = clock()
    work()
    end = clock()
    return wall(begin, end), slept(begin, end)


def computes(seconds: float) -> None:
    """Of this thread's own time, however busy the machine is."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_thread_that_waits_for_another_sleeps() -> None:
    other = threading.Timer(0.2, lambda: None)
    other.start()
    passed, asleep = during(other.join)
    assert asleep > 0.7 * passed


def test_a_thread_that_computes_does_not_sleep_however_long_it_queues_for_a_core() -> None:
    passed, asleep = during(lambda: computes(0.2))
    assert asleep < 0.2 * passed


def test_a_kernel_that_does_not_count_queues_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_DELAYS", Path("/proc/no-such-file"))
    passed, asleep = during(lambda: time.sleep(0.05))
    assert 0 < asleep <= passed


def test_what_the_kernel_calls_a_queue_is_no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    queued = iter((1.0, 1.0 + 0.03))
    monkeypatch.setattr(HostClock, "_queued", lambda self: next(queued))
    passed, asleep = during(lambda: time.sleep(0.05))
    assert 0 < asleep <= passed - 0.03
