"""A worker, run as a script. It imports nothing but Python's own, so that it starts in milliseconds.

Two processes: a guardian, which runs no code but this, and the worker, which calls what scores. When the worker ends,
or nobody holds the other end of its requests any more, the guardian ends the worker and all that it started.

Requests are pickles, each behind its length in 8 bytes: first how to begin, then lists of calls, which are how many
scores are wanted and the arguments. Answers are lines of JSON, one for each call: its scores, or a kind and words where
there are none; the first, empty, says that the worker is ready.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import math
import os
import pickle
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

SAID = 500
"""Characters of an exception that are told."""

_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36  # prctl's PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER
_LOOK = 1000
"""Milliseconds between two looks of the guardian at whether its parent lives, should another process hold its pipe."""


def main() -> None:
    """Splits in two; neither comes back."""
    parent = os.getppid()
    _prctl(_SET_SUBREAPER, 1)  # what the worker starts and leaves behind becomes the guardian's
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    worker = os.fork()
    if not worker:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        os.setpgid(0, 0)
        work()
        os._exit(0)
    os.close(1)
    guard(worker, woken, parent)
    code = end(worker)
    os._exit(code if code >= 0 else 128 - code)


def guard(worker: int, woken: int, parent: int) -> None:
    """Waits until the worker ends, or nobody wants it."""
    events = select.poll()
    events.register(0, 0)  # tells of a hang-up alone; what arrives is the worker's
    events.register(woken, select.POLLIN)
    wanted = True
    while wanted and os.getppid() == parent and not _ended(worker):
        for place, _ in events.poll(_LOOK):
            wanted = wanted and place != 0
            if place == woken:
                os.read(woken, 4096)


def _ended(worker: int) -> bool:
    """Whether the worker has ended; who else has is looked after."""
    while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if ended.si_pid == worker:
            return True
        os.waitpid(ended.si_pid, 0)
    return False


def end(worker: int) -> int:
    """Kills the worker's group, and whatever of its descendants has left that; gives its exit code, or -signal."""
    code = 0
    while True:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker, signal.SIGKILL)
        for process in _descendants(os.getpid()):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        try:
            ended, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        code = os.waitstatus_to_exitcode(status) if ended == worker else code


def _descendants(root: int) -> list[int]:
    """Processes below one, where the system lists them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(root, []))
    for process in found:
        found += children.get(process, [])
    return found


def work() -> None:
    """Answers requests until there are no more."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # what is printed there is nobody's answer
        os.dup2(nothing, standard)
    try:
        score = _begun(**next(_read(requests)))
    except BaseException as error:
        _say(answers, _reason(error))
        return
    _say(answers, [])
    itself = os.getpid()
    for calls in _read(requests):
        for count, arguments in calls:
            answer = _scored(score, count, arguments)
            if os.getpid() != itself:  # a copy that the code made and forgot to end
                return
            _say(answers, answer)


def _begun(target: str, path: Sequence[str], memory: int, setup: Mapping[str, Any] | None) -> Callable[..., Any]:
    """What scores: `package.module:name` or `path.py:name`, or what that makes of its `setup`."""
    sys.path[:] = path
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # of all processes, the system may end this one first
        Path("/proc/self/oom_score_adj").write_text("1000")
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    if memory and (most == resource.RLIM_INFINITY or memory < most):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    place, _, name = target.rpartition(":")
    found: Any = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    for part in name.split("."):
        found = getattr(found, part)
    made = found if setup is None else found(**setup)
    if not callable(made):
        raise TypeError(f"{name} is no function but {type(made).__name__}")
    function: Callable[..., Any] = made
    return function


def _file(path: Path) -> Any:
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(requests: BinaryIO) -> Iterator[Any]:
    while len(head := requests.read(8)) == 8:
        yield pickle.loads(requests.read(struct.unpack("<Q", head)[0]))


def _scored(score: Callable[..., Any], count: int, arguments: Sequence[Any]) -> list[Any]:
    """`[score, ...]`, one for each answer of the call, or `[kind, words]`."""
    try:
        scores = score(*arguments)
        if hasattr(scores, "tolist"):  # of numpy, torch and their like
            scores = scores.tolist()
        many = scores if isinstance(scores, list | tuple) else [scores]
        if len(many) != count:
            raise ValueError(f"it gave {len(many)} scores for {count} answers")
        return [_number(one) for one in many]
    except BaseException as error:
        return _reason(error)


def _number(score: Any) -> float:
    """A score as a number. Raises TypeError or ValueError where it is none that can be learned from."""
    if isinstance(score, str | bytes) or not hasattr(score, "__float__"):
        raise TypeError(f"it gave {'None' if score is None else f'a {type(score).__name__}'}, which is no number")
    number = float(score)
    if not math.isfinite(number):
        raise ValueError(f"it gave {number}, of which nothing can be learned")
    return number


def _reason(error: BaseException) -> list[str]:
    try:
        said = str(error)[:SAID]
    except BaseException as silent:
        said = f"and says nothing, because {type(silent).__name__}"
    return [type(error).__name__, said]


def _say(answers: int, answer: list[Any]) -> None:
    line = (json.dumps(answer) + "\n").encode()
    while line:
        line = line[os.write(answers, line) :]


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    main()
