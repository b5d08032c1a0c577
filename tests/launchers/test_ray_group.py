"""Nodes of launcher=ray that are followed: who is asked to leave, when, and what is said of those that are lost."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from loomtune.contracts import JobSpec
from loomtune.errors import Preempted, UserError
from loomtune_launchers.ray import group as ray_group
from loomtune_launchers.ray.group import Group


class Actor:
    """An actor as its launcher sees it. answers: of `hear`, in order; the last one stays."""

    def __init__(self, *answers: Any, sees: bool = True) -> None:
        self.told: list[str] = []
        self.answers = list(answers)
        self.greeting = {"host": "loom", "address": "10.0.0.1", "port": 4, "sees": sees}

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> tuple[Actor, str]:
            self.told.append(name)
            return self, name

        return types.SimpleNamespace(remote=remote)

    def answer(self, name: str) -> Any:
        if name != "hear":
            return self.greeting
        if "end" in self.told:
            return [], -9
        found = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


class Dead(Exception):
    """Ray's word for an actor that is gone."""


class Away(Dead):
    """And for one that may come back."""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """As much of Ray as is asked when nodes are followed."""
    module = types.ModuleType("ray")
    module.get = lambda asked: [a.answer(n) for a, n in asked] if isinstance(asked, list) else asked[0].answer(asked[1])
    module.wait = lambda refs, timeout: (refs, [])
    module.exceptions = types.SimpleNamespace(RayError=Dead, ActorUnavailableError=Away)
    monkeypatch.setitem(sys.modules, "ray", module)
    for name in ("TICK", "SETTLE", "SLACK"):
        monkeypatch.setattr(ray_group, name, 0)
    return module


def group(monkeypatch: pytest.MonkeyPatch, run: Path, *actors: Actor, asked: int = 0, grace: int = 0) -> Group:
    waiting = iter(actors)
    monkeypatch.setattr(ray_group, "_actor", lambda placement, i: next(waiting))
    job = JobSpec(run=run, arguments=(), grace=grace)
    return Group(job, None, len(actors), types.SimpleNamespace(times=asked))


RUNS = ([], None)


@pytest.mark.parametrize("end", [([], 7), Dead("it is gone")])
def test_when_one_fails_the_others_are_asked_to_leave_once_and_then_ended(
    end: Any, ray: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, patient = Actor(RUNS, end), Actor(RUNS)
    both = group(monkeypatch, tmp_path, failing, patient)
    both.follow()
    assert "stop" not in failing.told and [word for word in patient.told if word != "hear"] == ["stop", "end"]
    assert both.lost == (["a node was lost: it is gone"] if isinstance(end, Exception) else [])


def test_a_lost_node_is_named_though_others_failed_of_it_before_ray_knew(
    ray: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, lost = Actor(([], 1)), Actor(RUNS, RUNS, Dead("it is gone"))
    group(monkeypatch, tmp_path, failing, lost, grace=5).follow()
    assert "stop" in lost.told
    assert "a node was lost: it is gone" in capsys.readouterr().err


def test_an_actor_that_is_away_for_a_while_is_waited_for(
    ray: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = group(monkeypatch, tmp_path, Actor(Away("somewhere"), RUNS, ([], 0)))
    one.follow()
    assert not one.lost and one.members[0].code == 0


def test_what_is_said_is_shown_where_it_was_said(
    ray: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group(monkeypatch, tmp_path, Actor(([(False, "loss 3\n"), (True, "careful\n")], None), ([], 0))).follow()
    assert capsys.readouterr() == ("loss 3\n", "careful\n")


def test_a_stop_reaches_a_node_once_however_long_it_takes_to_leave(
    ray: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Actor(RUNS, RUNS, RUNS, RUNS, ([], Preempted.exit_code))
    group(monkeypatch, tmp_path, slow, asked=1, grace=600).follow()
    assert [word for word in slow.told if word != "hear"] == ["stop"]


def test_asked_twice_nothing_is_waited_for(
    ray: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = Actor(RUNS)
    group(monkeypatch, tmp_path, patient, asked=2).follow()
    assert [word for word in patient.told if word != "hear"] == ["stop", "end"]


def test_a_node_that_does_not_see_the_run_is_named_before_any_starts(
    ray: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors = Actor(RUNS), Actor(RUNS, sees=False)
    with pytest.raises(UserError, match=r"loom \(10\.0\.0\.1\) does not see .*\n.*run\.dir"):
        group(monkeypatch, tmp_path, *actors).meet("now")
    assert all("start" not in actor.told for actor in actors)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("The actor died unexpectedly.\n\tpid: 3\nIts node has died: terminated.", "Its node has died: terminated."),
        ("one line", "one line"),
        ("", "Dead"),
    ],
)
def test_of_an_error_of_ray_s_the_line_that_says_why_is_told(error: str, line: str) -> None:
    assert ray_group._line(Dead(error)) == line


def test_without_ray_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'loomtune\[ray\]'"), ray_group.connected("auto"):
        pass


@pytest.mark.parametrize("by_variable", [False, True])
def test_where_no_cluster_listens_that_is_told_at_once(by_variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*given: Any, **more: Any) -> None:
        pytest.fail("Ray would wait for minutes")

    module = types.ModuleType("ray")
    module.is_initialized, module.init = lambda: False, init
    module.util = types.SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
    module.exceptions = types.SimpleNamespace(RayError=Dead)
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    said = "no Ray cluster answers at .*refused"
    with pytest.raises(UserError, match=said), ray_group.connected("auto" if by_variable else "127.0.0.1:1"):
        pass


def test_whoever_waits_for_room_may_be_asked_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = types.SimpleNamespace(times=1)
    with pytest.raises(Preempted, match="before there was room"):
        ray_group._ready(types.SimpleNamespace(wait=lambda seconds: False), 60, asked)
